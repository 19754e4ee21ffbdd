"""references.py on mock engines: figures, resume, refusals; and on the real toy pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mock_engine import MockEngine, Said, Settings, scoring

from laguna_serve.bench.arms import arms
from laguna_serve.evals import references
from laguna_serve.evals.distance import runner
from laguna_serve.serving.engine import EngineConfig

TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = ["a = 1\n", "b = 2\n", "c = 3\n"]
PLAIN = ["d = 1\n", "e e e\n", "f = 3\n"]
# Of the first prompt another text, of the second a longer one, of the last the same.
OTHER = ["g g g\n", "e e e\nh = 2\n", "f = 3\n"]
END = 0
Run = Callable[..., tuple[int, dict[str, Any], str]]


def say(texts: list[str], broken: str | None = None, **more: Any) -> Settings:
    """Settings of an endpoint that answers each prompt, as token ids behind a first one, with a token per character."""
    known = dict(zip(PROMPTS, texts, strict=True))

    def says(_: MockEngine, body: Mapping[str, Any]) -> Said | int:
        assert (body["temperature"], body["ignore_eos"], body["top_p"]) == (0, False, 1)
        assert "logprobs" not in body
        prompt = "".join(map(chr, body["prompt"])).removeprefix("\x01")
        if prompt == broken:
            return 500
        text = next(text for whole, text in known.items() if whole.endswith(prompt))
        ids = [*map(ord, text), END][: body["max_tokens"]]
        return Said(ids, text[: body["max_tokens"]], [], body["prompt"])

    return Settings(says=says, **{"listed_length": True} | more)


@pytest.fixture
def serve() -> Iterator[Any]:
    """Start mock endpoints; they are gone when the test ends."""
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(MockEngine(settings))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{n}", "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
    return path


@pytest.fixture
def measure(
    tmp_path: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run references.py; give exit status, last line, output."""
    monkeypatch.setattr(arms, "DEATH_S", 0.0)

    def run(*flags: str) -> tuple[int, dict[str, Any], str]:
        usual = ["--prompts", str(prompts_file), "--max-tokens", "16", "--out", str(tmp_path / "out")]
        try:
            status = references.main([*usual, *flags])
        except SystemExit as error:
            status = int(str(error.code))
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, " ".join((captured.out + captured.err).split())

    return run


def name_urls(baseline: MockEngine, judge: MockEngine, **others: MockEngine) -> list[str]:
    named = [flag for name, other in others.items() for flag in ("--other", f"{name}={other.url}")]
    return ["--baseline-url", baseline.url, "--judge-url", f"{judge.url}/v1", *named]


def test_figures_by_hand(measure: Run, serve: Any, tmp_path: Path) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    status, result, output = measure(*name_urls(ours, judge, other=theirs, same=ours))
    assert (status, result["schema"]) == (0, "laguna_serve.references/1")
    assert list(result["references"]) == ["baseline", "other", "same"]
    # A character costs its number ÷ 100 nats, the end of an answer none.
    loss = {text: sum(map(ord, text)) / 100 / (len(text) + 1) for text in {*PLAIN, *OTHER}}
    differences = [loss[there] - loss[here] for here, there in zip(PLAIN, OTHER, strict=True)]
    baseline, other, same = result["references"].values()
    assert baseline["loss"]["mean"] == pytest.approx(sum(map(loss.get, PLAIN)) / 3)  # type: ignore[arg-type]
    assert other["loss"]["difference"] == pytest.approx(sum(differences) / 3)
    assert min(differences) <= other["loss"]["ci95"][0] < other["loss"]["ci95"][1] <= max(differences)
    # Lines: 1, 0, 1 and 0, 1 of 2, 1.
    assert (baseline["python_lines"]["mean"], baseline["python_lines"]["difference"]) == (pytest.approx(2 / 3), None)
    assert other["python_lines"]["difference"] == pytest.approx(-0.5 / 3)
    # Of "d = 1", "g g g" and ends: blanks, line break, end; of "e e e" all but its end; all of "f = 3".
    assert other["distance"] == {"identical": 1, "same": 4 + 6 + 7, "positions": 7 + 13 + 7, "share": 17 / 27}
    assert (same["distance"]["identical"], same["distance"]["share"]) == (3, 1.0)
    assert same["loss"]["ci95"] == same["python_lines"]["ci95"] == [0.0, 0.0]
    assert baseline["distance"] is None
    assert baseline["speed"]["steps_per_answer"] is None
    assert (baseline["tokens_per_answer"], other["tokens_per_answer"]) == (7, 9)
    assert "No row is called lossless against another" in output
    page = (tmp_path / "out" / "references.md").read_text()
    assert page.startswith("# What another reference costs\n\nEach reference is exact in itself")
    assert "| other | 9.0 | – |" in page
    assert "1 of 3 | 63.0% |" in page
    whole = json.loads((tmp_path / "out" / "references.json").read_text())
    assert whole["prompts"][1]["tokens"] == {"baseline": 7, "other": 13, "same": 7}
    assert "prompts" not in result


def test_last_line_of_an_answer_that_ended_by_itself_is_whole(measure: Run, serve: Any) -> None:
    # The first one is cut off after 16 tokens, in the midst of a line.
    ours = serve(say(["x = 1\nyyyyyyy = 2", "return 1", "x = 1\ny = ("]))
    _, result, _ = measure(*name_urls(ours, serve(scoring()), same=ours))
    assert result["references"]["baseline"]["python_lines"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_reference_that_is_removed_takes_its_losses_along(measure: Run, serve: Any, tmp_path: Path) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    assert measure(*name_urls(ours, judge, other=theirs))[0] == 0
    status, _, output = measure(*name_urls(ours, judge, other=ours))
    assert status == 2
    folder = tmp_path / "out" / "answers" / "references" / "other"
    assert f"{folder}: expected" in output
    shutil.rmtree(folder)
    status, result, _ = measure(*name_urls(ours, judge, other=ours))
    assert (status, result["references"]["other"]["loss"]["difference"]) == (0, 0.0)
    assert len(judge.seen) == 9


def test_prompts_that_were_lost_are_read_again(measure: Run, serve: Any, tmp_path: Path) -> None:
    ours, judge = serve(say(PLAIN)), serve(scoring())
    assert measure(*name_urls(ours, judge, same=ours))[0] == 0
    (tmp_path / "out" / "answers" / "prompts.jsonl").unlink()
    assert measure(*name_urls(ours, judge, same=ours))[0] == 0
    assert (len(ours.seen), len(judge.seen)) == (6, 6)


def test_a_reference_whose_context_is_shorter_is_refused(measure: Run, serve: Any) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER, max_model_len=37)), serve(scoring())
    status, _, output = measure(*name_urls(ours, judge, other=theirs))
    assert status == 2
    assert "other: expected room for prompts of 7 tokens, got 5; begin another --out with --prompt-tokens 5" in output


def test_every_reference_and_the_judge_get_the_baselines_token_ids(measure: Run, serve: Any) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    assert measure(*name_urls(ours, judge, other=theirs), "--concurrency", "1")[0] == 0
    sent = [[1, *map(ord, prompt)] for prompt in PROMPTS]
    assert ours.seen == theirs.seen == sent
    answers = [[*map(ord, text), END] for pair in zip(PLAIN, OTHER, strict=True) for text in pair]
    assert judge.seen == [sent[index // 2] + answer for index, answer in enumerate(answers)]


def test_long_prompts_are_cut_from_the_left_and_counted(measure: Run, serve: Any) -> None:
    # A canvas of 32 in 37 leaves 5 of the 7 tokens of a prompt.
    ours, theirs = serve(say(PLAIN, max_model_len=37)), serve(say(OTHER, max_model_len=37))
    judge = serve(scoring(max_model_len=20))
    status, result, output = measure(*name_urls(ours, judge, other=theirs))
    assert (status, result["workload"]["cut"], result["workload"]["longest"]) == (0, 3, 5)
    assert sorted(ours.seen) == sorted([*map(ord, prompt[-5:])] for prompt in PROMPTS)
    assert "3 of 3 prompts were cut from the left to 5 tokens." in output
    assert result["judge"]["shortened"] == 3
    assert "Of 3 prompts the judge read the end alone" in output


def test_canvas_that_leaves_no_room_is_refused(measure: Run, serve: Any) -> None:
    ours, judge = serve(say(PLAIN, max_model_len=32)), serve(scoring())
    status, _, output = measure(*name_urls(ours, judge, same=ours))
    assert status == 2
    assert "--max-tokens: expected room for a canvas of 32 tokens and a prompt, got 32 tokens of context" in output


def test_prompts_are_cut_as_asked(measure: Run, serve: Any) -> None:
    ours, judge = serve(say(PLAIN)), serve(scoring())
    assert measure(*name_urls(ours, judge, same=ours), "--prompt-tokens", "4")[1]["workload"]["cut"] == 3
    assert {len(prompt) for prompt in ours.seen} == {4}


def test_empty_answers_have_no_loss(measure: Run, serve: Any) -> None:
    def says(_: MockEngine, body: Mapping[str, Any]) -> Said:
        return Said([], "", [], body["prompt"])

    ours, judge = serve(say(PLAIN)), serve(scoring())
    theirs = serve(Settings(says=says, listed_length=True))
    status, result, output = measure(*name_urls(ours, judge, none=theirs))
    assert (status, result["judge"]["unscored"]) == (0, 3)
    assert [one["loss"] for one in result["references"].values()] == [None, None]
    assert "3 prompts have no loss" in output


def test_run_continues_with_what_is_missing(measure: Run, serve: Any, tmp_path: Path) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER, broken=PROMPTS[2])), serve(scoring())
    flags = [*name_urls(ours, judge, other=theirs), "--concurrency", "1"]
    status, _, output = measure(*flags)
    assert status == 2
    assert "references.py: error: prompt p2: request: HTTP 500" in output
    assert (len(ours.seen), len(theirs.seen), judge.seen) == (3, 3, [])
    answers = tmp_path / "out" / "answers" / "references" / "baseline" / "answers.jsonl"
    answers.write_text(answers.read_text()[:-20])
    theirs.settings = replace(say(OTHER))
    judge.settings = scoring(die_after=4)
    status, _, output = measure(*flags)
    assert status == 2
    assert (len(ours.seen), len(theirs.seen), len(judge.seen)) == (4, 4, 4)
    judge.settings = scoring()
    status, result, _ = measure(*flags)
    assert status == 0
    assert result["references"]["baseline"]["speed"]["answers"] == 4
    assert (len(ours.seen), len(theirs.seen), len(judge.seen)) == (4, 4, 6)
    first = (tmp_path / "out" / "references.json").read_text()
    assert measure(*flags)[0] == 0
    assert len(judge.seen) == 6
    again = json.loads((tmp_path / "out" / "references.json").read_text())
    assert again["references"] == json.loads(first)["references"]
    status, _, output = measure(*flags, "--num-prompts", "2")
    assert status == 2
    assert "got another one's; choose another --out or remove it" in output


def test_interrupted_run_keeps_its_answers(measure: Run, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    with monkeypatch.context() as patch:
        patch.setattr(runner, "check_tokenizer", stop)
        status, _, output = measure(*name_urls(ours, judge, other=theirs))
    assert status == 130
    assert "the same command continues" in output
    assert measure(*name_urls(ours, judge, other=theirs))[0] == 0
    assert len(ours.seen) == 3


def test_another_reference_and_another_judge_ask_for_what_is_new(measure: Run, serve: Any) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    assert measure(*name_urls(ours, judge, other=theirs))[0] == 0
    assert measure(*name_urls(ours, judge, other=theirs, same=ours))[0] == 0
    assert (len(ours.seen), len(theirs.seen), len(judge.seen)) == (6, 3, 9)
    harsh = serve(scoring(loss=9.0))
    _, result, _ = measure(*name_urls(ours, harsh, other=theirs))
    assert result["references"]["other"]["loss"] == {"mean": 9.0, "difference": 0.0, "ci95": [0.0, 0.0], "prompts": 3}
    assert (len(ours.seen), len(judge.seen), len(harsh.seen)) == (6, 9, 6)


class OtherTokenizer(MockEngine):
    """Reads every character as the next one."""

    async def _tokenize(self, request: Any) -> Any:
        answer = await super()._tokenize(request)
        body = json.loads(answer.text)
        from aiohttp import web

        return web.json_response(body | {"tokens": [token + 1 for token in body["tokens"]]})


@pytest.mark.parametrize("who", ["other", "judge"])
def test_another_tokenizer_is_refused(measure: Run, serve: Any, who: str) -> None:
    ours, theirs, judge = serve(say(PLAIN)), serve(say(OTHER)), serve(scoring())
    with OtherTokenizer(say(OTHER) if who == "other" else scoring()) as foreign:
        flags = name_urls(ours, foreign, other=theirs) if who == "judge" else name_urls(ours, judge, other=foreign)
        status, _, output = measure(*flags)
        assert foreign.seen == []
    assert status == 2
    assert f"{who}: expected the baseline's tokenizer, got one that reads prompt p0 as other tokens; choose" in output
    # Another one may be named, and nothing is asked for again.
    assert measure(*name_urls(ours, judge, other=theirs))[0] == (0 if who == "judge" else 2)
    assert len(ours.seen) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --other"),
        (["--other", "dual"], "expected NAME=FLAGS or NAME=URL like 'dual=--cache dual', got 'dual'"),
        (["--other", "../x=--cache dual"], "expected NAME=FLAGS or NAME=URL"),
        (["--other", "a=", "--other", "a="], "--other a: expected names of their own, got one that is taken"),
        (["--other", "baseline="], "--other baseline: expected names of their own"),
        (["--other", "a='"], "--other a: expected flags as in a shell, got no closing quotation"),
        (["--other", "a=http://127.0.0.1:9"], "--other a: expected flags, as the baseline has no URL, got the other"),
        (["--other", "a=", "--judge-url", "http://127.0.0.1:9"], "--judge and --judge-url: expected one of them, got"),
        (["--other", "a=", "--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--other", "a=", "--num-prompts", "4"], "--num-prompts: expected at most 3, got 4"),
        (["--other", "a=--cache all"], "argument --cache: invalid choice: 'all'"),
        (["--other", "a=--port 9"], "--port: expected it from the launcher"),
        (
            ["--other", "a=", "--judge", str(TOY / "llada")],
            "llada: expected a causal model, which reads an answer from",
        ),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    measure: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(arms, "Engine", None)
    status, _, output = measure("--model", str(TOY / "llada"), "--judge", str(TOY / "teacher"), *flags)
    assert status == 2
    assert message in output


def test_urls_are_all_or_none(measure: Run) -> None:
    nobody = "http://127.0.0.1:9"
    status, _, output = measure("--baseline-url", nobody, "--other", "a=--cache dual", "--judge", "M")
    assert status == 2
    assert "--other a: expected a URL, as the baseline's, got the other" in output
    status, _, output = measure("--baseline-url", nobody, "--other", f"a={nobody}", "--judge-url", nobody)
    assert status == 2
    assert f"{nobody}/v1/models: expected a list of models" in output


@pytest.mark.parametrize("special", [False, True])
def test_judge_with_another_vocabulary_is_refused_before_an_engine_starts(
    measure: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, special: bool
) -> None:
    monkeypatch.setattr(arms, "Engine", None)
    judge = tmp_path / "judge"
    judge.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (judge / name).write_text((TOY / "teacher" / name).read_text())
    tokenizer = json.loads((judge / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    if special:
        one, two = tokenizer["added_tokens"][:2]
        one["id"], two["id"] = two["id"], one["id"]
    else:
        first, second = list(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (judge / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, _, output = measure("--model", str(TOY / "llada"), "--judge", str(judge), "--other", "a=--cache dual")
    assert status == 2
    assert f"expected the tokenizer of {TOY / 'llada'}, got one in which 2 of" in output


def test_engines_run_one_at_a_time_the_judge_last(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class MockLauncher:
        """Takes the launcher's place: a mock endpoint by the flags that it is started with."""

        def __init__(self, config: EngineConfig, **_: Any) -> None:
            is_judge = Path(config.model).name == "teacher"
            self.model_name = "fake"
            self._name = "judge" if is_judge else " ".join(config.extra_args)
            self._fake = MockEngine(scoring() if is_judge else say(OTHER if config.extra_args else PLAIN))

        def __enter__(self) -> MockLauncher:
            log.append(f"+{self._name}")
            self._fake.__enter__()
            self.base_url = self._fake.url
            return self

        def __exit__(self, *_: Any) -> None:
            log.append(f"-{self._name}")
            self._fake.__exit__(None, None, None)

        def check(self) -> None:
            pass

    monkeypatch.setattr(arms, "Engine", MockLauncher)
    flags = ["--model", str(TOY / "llada"), "--judge", str(TOY / "teacher"), "--other", "dual=--cache dual"]
    status, result, _ = measure(*flags)
    assert (status, result["references"]["dual"]["distance"]["identical"]) == (0, 1)
    assert log == ["+", "-", "+--cache dual", "---cache dual", "+judge", "-judge"]
    assert measure(*flags)[0] == 0
    assert len(log) == 6  # nothing is started again


@pytest.mark.vllm
def test_toy_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", str(TOY / "llada"), "--judge", str(TOY / "teacher")]
    others = ["--other", "two=--cache dual --tokens-per-step 2", "--baseline-args=--cache dual"]
    size = ["--prompts", str(TOY / "prompts.jsonl"), "--quick", "--num-prompts", "3", "--max-tokens", "32"]
    assert references.main([*models, *others, *size, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    baseline, two = result["references"].values()
    # A canvas of one block, a token a step and two; an answer may end before it is full.
    steps = [one["speed"]["steps_per_answer"] for one in (baseline, two)]
    assert steps[0] <= 32
    assert steps[1] <= 16 < steps[0]
    assert two["distance"]["share"] < 1
    # A model that guesses loses the logarithm of its 512 tokens, 6.2.
    assert 0 < baseline["loss"]["mean"] < 5
    assert two["loss"]["ci95"][0] <= two["loss"]["difference"] <= two["loss"]["ci95"][1]
