"""invariance.py on fake endpoints: verdicts, noise, failures, resume, refusals; and on the real toy engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mock_engine import MockEngine, Settings, Variants

from laguna_serve.bench.arms import arms
from laguna_serve.evals import invariance
from laguna_serve.evals.codegen.grading import Grade, Limits
from laguna_serve.evals.equivalence import arms as equivalence_arms
from laguna_serve.evals.equivalence import runner
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import choice
from laguna_serve.serving.engine import Engine, EngineConfig

COUNT = 9
PROMPTS = [f"def add_{index}(x):\n" for index in range(COUNT)]
RIGHT = [f"    return x + {index}\n" for index in range(COUNT)]
ALSO_RIGHT = [f"    return {index} + x\n" for index in range(COUNT)]
WRONG = [f"    return x - {index + 1}\n" for index in range(COUNT)]
# In this dtype a margin of 0.01 nats is rounding, one of 0.5 is not.
NEAR, FAR = 0.01, 0.5
Answer = tuple[int, dict[str, Any], str]


@pytest.fixture
def problems_file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    test = "def check(candidate):\n    assert candidate(1) == 1 + {0}\n    assert candidate(-{0}) == 0\n"
    items = [
        {"task_id": f"t{index}", "prompt": prompt, "entry_point": f"add_{index}", "test": test.format(index)}
        for index, prompt in enumerate(PROMPTS)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(autouse=True)
def _grade_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs are this file's own: graded in this process, fast, unless an engine wrote them."""
    if "vllm" not in request.keywords:
        monkeypatch.setattr(runner, "grade", grade_here)
        monkeypatch.setattr(choice, "find_obstacle", lambda _: None)


def grade_here(problem: Problem, program: str, _limits: Limits) -> Grade:
    scope: dict[str, Any] = {}
    exec(program, scope)
    exec(problem.test, scope)
    try:
        scope["check"](scope[problem.entry_point])
    except AssertionError:
        return Grade(0.0, False, 0, 2, "failed", "")
    return Grade(1.0, True, 2, 2, "passed", "")


@pytest.fixture
def compare(tmp_path: Path, problems_file: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run invariance.py on two endpoints; give exit status, last line, output."""

    def run(ours: MockEngine, theirs: MockEngine, *more: str) -> Answer:
        flags = ["--problems", str(problems_file), "--out", str(tmp_path / "out"), "--form", "completion"]
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url, "--dtype", "bfloat16"]
        status = invariance.main([*flags, *urls, *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, " ".join((captured.out + captured.err).split())

    return run


@pytest.fixture
def serve() -> Iterator[Any]:
    """Start mock endpoints; they are gone when the test ends."""
    with ExitStack() as stack:
        yield lambda *given, **named: stack.enter_context(MockEngine(*given, **named))


def say(
    *texts: list[str],
    margin: float = 0.5,
    choose: Callable[[str, int], int] = lambda _prompt, _asked: 0,
    broken: Collection[str] = (),
    drafts: int | None = None,
    log: list[str] | None = None,
    name: str = "",
    **more: Any,
) -> Settings:
    """Settings of an endpoint that knows these answers to each problem, and gives the first, or as `choose` says.

    It counts `drafts` per answer, fails for `broken` prompts and notes its `name` in the `log` with every request.
    """
    variants = Variants(dict(zip(PROMPTS, zip(*texts, strict=True), strict=True)), choose, margin)

    def says(engine: MockEngine, body: Mapping[str, Any]) -> Any:
        if log is not None:
            log.append(name)
        return variants(engine, body)

    counts = {"counted": False} if drafts is None else {"gamma": 3, "drafts_per_answer": drafts}
    return Settings(says=says, faults=dict.fromkeys(broken, "http_500"), requires=(), **counts, **more)


def read_page(tmp_path: Path) -> str:
    return (tmp_path / "out" / "invariance.md").read_text()


def test_equal_arms_are_invariant_and_asked_in_one_mixed_order(compare: Any, serve: Any, tmp_path: Path) -> None:
    log: list[str] = []
    ours, theirs = serve(say(RIGHT, log=log, name="b")), serve(say(RIGHT, log=log, name="c"))
    status, result, output = compare(ours, theirs, "--concurrency", "1")
    assert (status, result["verdict"], result["schema"]) == (0, "invariant", "laguna_serve.invariance/1")
    assert {name: found["across"] for name, found in result["levels"].items()} == dict.fromkeys(result["levels"], 0)
    assert result["levels"]["tokens"]["bound95"] == pytest.approx(1 - 0.05 ** (1 / COUNT))
    assert result["rewards"] == {"baseline": 1.0, "candidate": 1.0, "difference": 0.0, "ci95": [0.0, 0.0]}
    assert result["confirmation"] is None
    assert (result["difference_nats"], result["noise_nats"]) == ({"any_two": 0, "one_arm": 0}, 2**-4)
    assert "At 95% confidence at most 28.31% of such problems differ" in output
    assert read_page(tmp_path).startswith("# Invariance\n\n**Invariant on 9 problems: ")
    assert sorted(ours.seen) == sorted(PROMPTS * 2) == sorted(theirs.seen)
    # Were the arms taken in turns, or in blocks, there would be 1 change or 35.
    assert 8 < sum(a != b for a, b in pairwise(log)) < 27
    assert compare(ours, theirs, "--concurrency", "1")[0] == 0
    assert len(log) == 4 * COUNT  # nothing was asked again


def test_one_problem_that_is_always_another_is_confirmed_and_differs(compare: Any, serve: Any, tmp_path: Path) -> None:
    ours = serve(say(RIGHT, ALSO_RIGHT, margin=FAR))
    theirs = serve(say(RIGHT, ALSO_RIGHT, margin=FAR, choose=lambda prompt, _: int(prompt == PROMPTS[3])))
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (1, "differs")
    assert result["confirmation"]["problems"] == ["t3"]
    assert result["confirmation"]["levels"]["unexplained"]["apart_p"] == pytest.approx(1 / 462)
    assert "asked 6 more times: tokens part beyond rounding on 1 problem," in output
    [found] = result["divergences"]
    assert (found["task_id"], found["levels"], found["index"]) == ("t3", ["tokens", "text", "program"], 11)
    assert (found["classification"], found["unsteady"]) == ("defect", [])
    assert (found["baseline_text"][0], found["candidate_text"][0]) == ("x", "3")
    page = read_page(tmp_path)
    assert "  -    return x + 3\n  +    return 3 + x\n" in page
    assert "margin 0.5" in page
    problems = json.loads((tmp_path / "out" / "invariance.json").read_text())["problems"]
    assert [problem["task_id"] for problem in problems] == [f"t{index}" for index in range(COUNT)]


def test_near_ties_with_equal_rewards_are_explained(compare: Any, serve: Any) -> None:
    ours = serve(say(RIGHT, ALSO_RIGHT, margin=NEAR))
    theirs = serve(say(RIGHT, ALSO_RIGHT, margin=NEAR, choose=lambda prompt, _: int(prompt in PROMPTS[:4])))
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (0, "explained")
    assert {name: found["across"] for name, found in result["levels"].items()} == {
        "tokens": 4,
        "text": 4,
        "program": 4,
        "reward": 0,
        "unexplained": 0,
    }
    assert "no reward differs" in output


@pytest.mark.slow
def test_prose_around_the_code_is_no_difference_of_programs(compare: Any, serve: Any) -> None:
    code = [f"```python\n{prompt}{body}```\n" for prompt, body in zip(PROMPTS, RIGHT, strict=True)]
    short, long = [f"Here it is:\n{one}" for one in code], [f"Hope this helps:\n{one}" for one in code]
    ours = serve(say(short, long, margin=FAR))
    theirs = serve(say(short, long, margin=FAR, choose=lambda *_: 1))
    status, result, _ = compare(ours, theirs, "--form", "chat")
    assert {name: found["across"] for name, found in result["levels"].items()} == {
        "tokens": COUNT,
        "text": COUNT,
        "program": 0,
        "reward": 0,
        "unexplained": COUNT,
    }
    # So many at once need no confirmation: 3⁻⁹ is chance enough.
    assert (status, result["verdict"], result["confirmation"]) == (1, "differs", None)


@pytest.mark.slow
def test_other_rewards_are_a_difference_even_where_rounding_explains_the_tokens(
    compare: Any, serve: Any, tmp_path: Path
) -> None:
    ours = serve(say(RIGHT, WRONG, margin=NEAR))
    theirs = serve(say(RIGHT, WRONG, margin=NEAR, choose=lambda prompt, _: int(prompt == PROMPTS[5])))
    status, result, output = compare(ours, theirs, "--repeats", "3")
    assert (status, result["verdict"]) == (1, "differs")
    assert result["levels"]["unexplained"]["across"] == 0
    assert result["rewards"]["difference"] == pytest.approx(-1 / COUNT)
    low, high = result["rewards"]["ci95"]
    assert low < -1 / COUNT < high <= 0
    assert "rewards differ on 1 problem," in output
    assert "rewards 1, 1, 1 against 0, 0, 0" in read_page(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("margin", [NEAR, FAR])
def test_noise_of_both_arms_alike_is_noise(compare: Any, serve: Any, margin: float) -> None:
    def roll(name: str) -> Any:
        return lambda prompt, asked: random.Random(f"{name} {prompt} {asked}").randrange(2)

    ours = serve(say(RIGHT, WRONG, margin=margin, choose=roll("b")))
    theirs = serve(say(RIGHT, WRONG, margin=margin, choose=roll("c")))
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (0, "noise")
    reward = result["levels"]["reward"]
    assert min(reward["within_baseline"], reward["within_candidate"]) > 0
    assert len(result["confirmation"]["problems"]) == reward["across"]
    assert "the tests cannot tell it from what the engine does to itself" in output


def test_candidate_that_alone_is_unsteady_differs(compare: Any, serve: Any) -> None:
    ours = serve(say(RIGHT, ALSO_RIGHT, margin=FAR))
    theirs = serve(say(RIGHT, ALSO_RIGHT, margin=FAR, choose=lambda _, asked: asked % 2))
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (1, "differs")
    assert result["levels"]["unexplained"]["scatter_p"] == pytest.approx(2**-COUNT)
    assert "tokens part beyond rounding between the candidate's own answers to 9 problems" in output


def test_one_slip_of_the_candidate_beyond_rounding_is_unclear(compare: Any, serve: Any) -> None:
    ours = serve(say(RIGHT, ALSO_RIGHT, margin=FAR))
    theirs = serve(
        say(RIGHT, ALSO_RIGHT, margin=FAR, choose=lambda prompt, asked: int((prompt, asked) == (PROMPTS[2], 1)))
    )
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (1, "unclear")
    assert "too seldom to tell from noise" in output


def test_prompts_read_as_other_tokens_differ(compare: Any, serve: Any) -> None:
    status, result, output = compare(serve(say(RIGHT)), serve(say(RIGHT, prompt_shift=1)))
    assert (status, result["verdict"]) == (1, "differs")
    assert "the endpoints read the prompts of 9 problems as other tokens than each other" in output


def test_failed_requests_give_no_verdict_until_they_are_answered(compare: Any, serve: Any, tmp_path: Path) -> None:
    ours, theirs = serve(say(RIGHT)), serve(say(RIGHT, broken={PROMPTS[1]}))
    status, result, output = compare(ours, theirs)
    assert (status, result["verdict"]) == (2, "could not tell")
    assert set(result["failures"]) == {"candidate/0/t1", "candidate/1/t1"}
    assert "Could not tell: 2 requests failed" in output
    assert "HTTP 500" in read_page(tmp_path)
    theirs.settings = replace(theirs.settings, faults={})
    assert compare(ours, theirs)[1]["verdict"] == "invariant"
    assert len(theirs.seen) == 2 * COUNT + 2


def test_an_arm_that_always_fails_is_given_up(compare: Any, serve: Any) -> None:
    ours, theirs = serve(say(RIGHT)), serve(say(RIGHT, ids=False))
    status, result, output = compare(ours, theirs, "--concurrency", "1")
    assert (status, result["verdict"]) == (2, "could not tell")
    assert (len(ours.seen), len(theirs.seen)) == (2 * COUNT, 5)
    assert "token_ids" in output


def test_interrupted_run_continues_with_what_is_missing(
    compare: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Grade:
        raise KeyboardInterrupt

    ours, theirs = serve(say(RIGHT)), serve(say(RIGHT))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "grade", stop)
        status, _, output = compare(ours, theirs)
    assert status == 130
    assert "the same command continues" in output
    answers = tmp_path / "out" / "answers" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-2]) + lines[-2][:50])
    assert compare(ours, theirs)[1]["verdict"] == "invariant"
    assert len(ours.seen) + len(theirs.seen) == 4 * COUNT + 2
    status, _, output = compare(ours, theirs, "--max-tokens", "7")
    assert status == 2
    assert "got another one's; choose another --out or remove it" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeats", "1"], "--repeats: expected 2 to 6, got 1; one answer shows no noise"),
        (["--repeats", "7"], "--repeats: expected 2 to 6, got 7"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--num-problems", "10"], "--num-problems: expected at most 9, got 10"),
        (["--problems", "missing.jsonl"], "missing.jsonl: expected a problems file"),
        (["--draft", "D"], "expected none with URLs"),
        (["--candidate-url", "http://127.0.0.1:9"], "expected a list of models"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    compare: Any, serve: Any, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    ours = serve(say(RIGHT))
    try:
        status, _, output = compare(ours, ours, *more)
    except SystemExit as error:
        status, output = int(str(error.code)), " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert message in output
    assert ours.seen == []


def test_without_a_sandbox_nothing_is_asked_unless_wanted(
    compare: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_obstacle", lambda walls: f"expected {walls}, got EPERM")
    ours = serve(say(RIGHT))
    status, _, output = compare(ours, ours)
    assert (status, ours.seen) == (2, [])
    assert "got EPERM; allow unprivileged user namespaces" in output
    status, _, output = compare(ours, ours, "--walls", "none")
    assert status == 0
    assert "on a throwaway machine only" in output


class MockLauncher:
    """Takes the launcher's place: a mock endpoint, another one for an engine that drafts."""

    started: list[str]
    both: tuple[Settings, Settings]

    def __init__(self, config: EngineConfig, **_: Any) -> None:
        drafting = config.draft is not None
        type(self).started.append("candidate" if drafting else "baseline")
        self._fake, self.model_name = MockEngine(type(self).both[drafting]), "fake"

    def __enter__(self) -> MockLauncher:
        self._fake.__enter__()
        self.base_url = self._fake.url
        return self

    def __exit__(self, *_: Any) -> None:
        self._fake.__exit__(None, None, None)

    def check(self) -> None:
        pass


@pytest.fixture
def compare_engines(
    tmp_path: Path, problems_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run invariance.py on mock engines; give the names of those started, in order, status and last line."""

    def run(ours: Settings, theirs: Settings) -> tuple[list[str], int, dict[str, Any]]:
        made = type("Made", (MockLauncher,), {"started": [], "both": (ours, theirs)})
        monkeypatch.setattr(arms, "Engine", made)
        monkeypatch.setattr(arms, "check_launches", lambda _configs: None)
        files = ["--problems", str(problems_file), "--out", str(tmp_path / "out")]
        status = invariance.main([*files, "--model", "M", "--draft", "D", "--form", "completion"])
        return made.started, status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_engines_are_started_together_or_in_turns(
    compare_engines: Any, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    other = say(RIGHT, WRONG, choose=lambda prompt, _: int(prompt == PROMPTS[0]), drafts=5)
    monkeypatch.setattr(equivalence_arms, "has_room_beside", lambda _arm: room)
    started, status, result = compare_engines(say(RIGHT, WRONG), other)
    assert (status, result["verdict"], result["workload"]["interleaved"]) == (1, "differs", room)
    assert result["arms"]["candidate"]["acceptance"] == pytest.approx(3)
    assert result["arms"]["baseline"]["acceptance"] is None
    # The confirmation begins with the arm that is up.
    assert started == (["baseline", "candidate"] if room else ["baseline", "candidate", "baseline"])
    started, _, result = compare_engines(say(RIGHT, WRONG), other)
    assert (started, result["workload"]["interleaved"]) == ([], room)


def test_drafter_that_never_drafts_tells_nothing(compare_engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence_arms, "has_room_beside", lambda _arm: True)
    _, status, result = compare_engines(say(RIGHT), say(RIGHT, drafts=0))
    assert (status, result["verdict"]) == (2, "could not tell")
    assert "never drafted" in result["reasons"][0]


@pytest.mark.vllm
@pytest.mark.parametrize("form", ["completion", "chat"])
def test_real_engine_against_itself_is_invariant(
    fp32_engine: Engine, tmp_path: Path, problems_file: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    urls = ["--baseline-url", fp32_engine.base_url, "--candidate-url", fp32_engine.base_url]
    size = ["--num-problems", "3", "--max-tokens", "24", "--form", form, "--concurrency", "1"]
    assert invariance.main([*urls, *size, "--problems", str(problems_file), "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["verdict"] == "invariant"
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    for answer in answers:
        assert 0 < len(answer["token_ids"]) == len(answer["top"]) <= 24
        assert answer["prompt_ids"]
