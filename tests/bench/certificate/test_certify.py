"""certify.py on mock engines: order, resume, failures, verdicts and pages."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ab_harness import PROMPTS, MockLauncher
from mock_engine import MockEngine, Settings
from mock_engine.models import list_tokens

from laguna_serve.bench import ab, certify
from laguna_serve.bench.arms import arms
from laguna_serve.bench.certificate import runner
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.engine.row_check import FirstDifference, RowCheck, Way

TOY = Path(__file__).resolve().parents[2] / "toy"
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")]
ROLES = ("baseline", "row-matched", "candidate", "reference")
NEAR, FAR = 0.01, 0.5


class RoleEngine(MockLauncher):
    """A mock that behaves by its role in the certificate."""

    roles: ClassVar[dict[str, Settings]] = {}
    started_roles: ClassVar[tuple[str, ...]] = ()

    rows_asked: ClassVar[list[tuple[Any, ...]]] = []
    rows_found: ClassVar[RowCheck | EngineError] = RowCheck(tokens=9, ways=[])

    @classmethod
    def check_rows(cls, *asked: Any) -> RowCheck:
        cls.rows_asked.append(asked)
        if isinstance(cls.rows_found, EngineError):
            raise cls.rows_found
        return cls.rows_found

    def choose(self, config: EngineConfig) -> Settings:
        role = find_role(config)
        type(self).started_roles += (role,)
        return type(self).roles.get(role, Settings())


def find_role(config: EngineConfig) -> str:
    if config.draft is None:
        return "reference" if config.dtype == "float32" else "baseline"
    return "row-matched" if "random-drafter" in config.draft else "candidate"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[RoleEngine]:
    made = type("Made", (RoleEngine,), {"roles": {}, "started_roles": (), "rows_asked": []})
    monkeypatch.setattr(arms, "Engine", made)
    monkeypatch.setattr(arms, "DEATH_S", 0.0)
    monkeypatch.setattr(runner, "check_rows", made.check_rows)
    return made


@pytest.fixture
def run(prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_certify(*more: str) -> tuple[int, dict[str, Any], str]:
        flags = [
            "--prompts",
            str(prompts_file),
            "--max-tokens",
            "10",
            "--concurrency",
            "1,3",
            "--out",
            str(tmp_path / "c"),
        ]
        status = certify.main([*PAIR, *flags, *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, " ".join((captured.out + captured.err).split())

    return run_certify


@pytest.mark.slow
def test_identical_arms_are_certified(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    engines.roles = {"row-matched": Settings(gamma=3), "candidate": Settings(gamma=3, chunk_tokens=3)}
    status, result, output = run()
    assert (status, result["verdict"]) == (0, "identical")
    assert engines.started_roles == ("baseline", "row-matched", "candidate")  # nothing to replay
    assert [load["concurrency"] for load in result["loads"]] == [1, 3]
    for load in result["loads"]:
        assert load["candidate"]["prompts"] == 14
        assert load["candidate"]["tokens"] == 140
        assert set(load["controls"]) == {"again", "row-matched"}
    assert result["arms"]["candidate"]["acceptance"] > 2
    assert "Identical: every token and byte of 14 prompts × 10 tokens at concurrency 1, 3" in output
    assert "at most 19.26%" in output
    assert "**Identical: every token" in (tmp_path / "c" / "certificate.md").read_text()
    # Everything is there: no engine is started again.
    assert run()[0] == 0
    assert len(engines.started_roles) == 3


@pytest.mark.slow
def test_where_bits_are_promised_a_tie_is_a_defect(engines: type[RoleEngine], run: Any) -> None:
    engines.roles = {
        "baseline": Settings(margin=NEAR),
        "row-matched": Settings(margin=NEAR, noise=0.02, gamma=3),
        "candidate": Settings(flips={PROMPTS[2]: 4}, margin=NEAR),
    }
    status, result, output = run("--identical", "--no-replay")
    assert (status, result["verdict"]) == (1, "defect")
    for load in result["loads"]:
        assert load["candidate"]["classes"] == {"tie": 0, "near_tie": 1, "defect": 0}
        assert "1 of 14 of the candidate's answers differ, of which none may" in load["reasons"]
        assert any("row-matched control's log-probabilities differ by up to" in reason for reason in load["reasons"])
    assert "of which none may" in output


@pytest.mark.slow
def test_near_tie_is_replayed_and_passes(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    token = list_tokens(Settings(), PROMPTS[2], 10)[4]
    tie = {"flips": {PROMPTS[2]: 4}, "margin": NEAR}
    engines.roles = {
        "baseline": Settings(margin=NEAR),
        "row-matched": Settings(margin=NEAR, noise=0.02, gamma=3),
        "candidate": Settings(**tie),
        "reference": Settings(next_top={token + 1: -0.6, token: -0.65}),
    }
    status, result, output = run()
    assert (status, result["verdict"]) == (0, "equal up to ties")
    assert engines.started_roles == ROLES
    found = result["loads"][0]["candidate"]["divergences"][0]
    assert (found["prompt_id"], found["index"], found["classification"]) == ("p2", 4, "near_tie")
    assert found["replay"]["preferred"] == "candidate"
    assert found["replay"]["margin"] == pytest.approx(0.05)
    assert result["replay"]["replayed"] == 2  # one per load
    assert "the exact model prefers the candidate's by 0.05 nats" in output
    page = (tmp_path / "c" / "certificate.html").read_text()
    assert "Equal up to ties" in page
    assert "Replayed, the exact model prefers the candidate&#39;s by 0.05 nats" in page


DIFFERENCE = FirstDifference(
    layer=2,
    module="model.layers.2.mlp.down_proj",
    kind="RowParallelLinear",
    side="output",
    operations=["linear"],
    positions=[7, 8],
    inputs_alone=[[1, 64]],
    inputs=[[4, 64]],
    dtype="bfloat16",
    largest=0.0625,
    ulps=2.0,
)


def near_ties() -> dict[str, Settings]:
    return {
        "baseline": Settings(margin=NEAR),
        "row-matched": Settings(margin=NEAR, noise=0.02, gamma=3),
        "candidate": Settings(flips={PROMPTS[2]: 4}, margin=NEAR),
    }


@pytest.mark.slow
def test_first_operation_is_named_where_answers_part(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    engines.roles = near_ties()
    engines.rows_found = RowCheck(
        tokens=9,
        ways=[
            Way(name="again", label="one row, again", compared=70, first=None),
            Way(name="rows", label="8 rows", compared=30, first=DIFFERENCE),
        ],
    )
    status, result, output = run("--no-replay")
    assert status == 0
    ((config, sequence, rows, copies, _),) = engines.rows_asked
    assert (config.draft, rows, copies) == (None, 8, 3)
    told = json.loads((tmp_path / "c" / "passes" / "baseline-c1.jsonl").read_text().splitlines()[2])
    # Four tokens agree; as many as are verified at once follow.
    assert list(sequence) == told["prompt_ids"] + told["token_ids"][: 4 + 8]
    assert result["row_check"]["ways"][1]["first"]["module"] == "model.layers.2.mlp.down_proj"
    assert "one row, again against one row at a time (9 tokens): none differs, over 70 values" in output
    named = "model.layers.2.mlp.down_proj (RowParallelLinear, calls linear; inputs [1, 64] alone, [4, 64] here)"
    assert f"the first that differs: {named} differs by at most 0.0625, 2 ulp of bfloat16." in output


@pytest.mark.slow
def test_first_operation_is_asked_for_only_where_something_differs_or_by_request(
    engines: type[RoleEngine], run: Any
) -> None:
    assert run()[1]["row_check"] is None
    assert engines.rows_asked == []
    assert run("--locate")[1]["row_check"] == {"tokens": 9, "ways": []}


@pytest.mark.slow
def test_certificate_goes_on_without_the_first_operation(engines: type[RoleEngine], run: Any) -> None:
    engines.roles = near_ties()
    engines.rows_found = EngineError("row check: expected a report, got status 1")
    status, result, output = run("--no-replay")
    assert (status, result["row_check"]) == (0, None)
    assert "No word on the first operation: row check: expected a report, got status 1." in output


@pytest.mark.slow
def test_first_operation_is_left_out_by_request(engines: type[RoleEngine], run: Any) -> None:
    engines.roles = near_ties()
    assert run("--no-replay", "--no-locate")[1]["row_check"] is None
    assert engines.rows_asked == []


@pytest.mark.slow
def test_defect_fails(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    engines.roles = {
        "baseline": Settings(margin=FAR),
        "row-matched": Settings(margin=FAR),
        "candidate": Settings(flips={PROMPTS[2]: 4}, margin=FAR),
    }
    status, result, output = run()
    assert (status, result["verdict"]) == (1, "defect")
    assert "1 of 14 prompts differ beyond rounding" in output
    parser = Page()
    parser.feed((tmp_path / "c" / "certificate.html").read_text())
    assert parser.open == []
    assert not parser.elsewhere


class Page(HTMLParser):
    """Whether every element is closed, and what is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.elsewhere += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control", "reason"),
    [
        (Settings(gamma=3, chunk_tokens=3), "it should verify drafts and accept none, and shows 2.33 tokens per step"),
        (Settings(), "it should verify drafts and accept none, and shows no draft"),
        (Settings(gamma=3, noise=-1.0), "of its tokens are not its target's first choice"),
    ],
)
def test_control_that_is_none_is_left_out(engines: type[RoleEngine], run: Any, control: Settings, reason: str) -> None:
    engines.roles = {"row-matched": control, "candidate": Settings(gamma=3, chunk_tokens=3)}
    status, result, output = run()
    assert status == 0
    assert reason in result["missing"]["row-matched"]
    assert set(result["loads"][0]["controls"]) == {"again"}
    assert "No row-matched control: " in output


@pytest.mark.slow
def test_stream_that_differs_from_what_was_examined_fails(engines: type[RoleEngine], run: Any) -> None:
    """An arm that is right only while it is asked for log-probabilities."""
    engines.roles = {"candidate": Settings(flips={PROMPTS[2]: 4}, flips_again={"none": 0}, margin=FAR)}
    status, result, output = run()
    assert status == 1
    assert result["loads"][0]["candidate"]["mismatches"] == 0
    assert "the candidate streams other tokens, beyond rounding" in output


def test_prompts_with_markup_cannot_break_the_page(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    file = tmp_path / "markup.jsonl"
    file.write_text(json.dumps({"id": "</pre><script>alert(1)</script>", "prompt": PROMPTS[2]}) + "\n")
    engines.roles = {"candidate": Settings(flips={PROMPTS[2]: 4}, margin=FAR)}
    assert run("--prompts", str(file))[0] == 1
    assert "<script>" not in (tmp_path / "c" / "certificate.html").read_text()


@pytest.mark.slow
def test_engine_that_dies_keeps_what_was_answered(engines: type[RoleEngine], run: Any, tmp_path: Path) -> None:
    engines.roles = {"candidate": Settings(die_after=9)}
    status, _, output = run()
    assert status == 2
    assert "got signal 9: out of memory" in output
    kept = (tmp_path / "c" / "passes" / "candidate-c1.jsonl").read_text().count("\n")
    assert kept == 9
    engines.roles = {}
    status, result, _ = run()
    assert (status, result["verdict"]) == (0, "identical")
    assert engines.started_roles == ("baseline", "row-matched", "candidate", "candidate")


@pytest.mark.slow
def test_interruption_keeps_what_was_answered(
    engines: type[RoleEngine], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = runner.judge_load

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "judge_load", interrupt)
    status, _, output = run()
    assert status == 130
    assert "the same command continues" in output
    monkeypatch.setattr(runner, "judge_load", judge)
    assert run()[0] == 0
    assert len(engines.started_roles) == 3


@pytest.mark.slow
@pytest.mark.parametrize("role", ["row-matched", "candidate"])
def test_interruption_after_the_passes_keeps_the_acceptance(
    engines: type[RoleEngine], run: Any, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """An arm whose prompts were still being streamed, or whose result was not yet written, has no pass left to make."""
    engines.roles = {"row-matched": Settings(gamma=3), "candidate": Settings(gamma=3, chunk_tokens=3)}
    write = runner.write_result

    def interrupt(path: Path, result: Any) -> None:
        if path.name == f"{role}.json":
            raise KeyboardInterrupt
        write(path, result)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_result", interrupt)
        assert run()[0] == 130
    status, result, _ = run()
    assert (status, result["missing"].get("row-matched")) == (0, None)
    assert result["arms"]["candidate"]["acceptance"] > 2
    assert result["arms"]["row-matched"]["acceptance"] == 1


def test_failed_request_is_named(engines: type[RoleEngine], run: Any) -> None:
    engines.roles = {"candidate": Settings(faults={PROMPTS[3]: "http_500"})}
    status, _, output = run()
    assert status == 2
    assert re.search("candidate: request: HTTP 500.*; the same command continues", output)


@pytest.mark.slow
def test_replay_that_fails_does_not_lose_the_certificate(engines: type[RoleEngine], run: Any) -> None:
    engines.roles = {
        "baseline": Settings(margin=NEAR),
        "row-matched": Settings(margin=NEAR, noise=0.02, gamma=3),
        "candidate": Settings(flips={PROMPTS[2]: 4}, margin=NEAR),
        "reference": Settings(die_after=0),
    }
    status, result, output = run()
    assert status == 0
    assert result["replay"] is None
    assert "No replay: " in output


def test_endpoints_by_url(prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompts", str(prompts_file), "--max-tokens", "8", "--concurrency", "2", "--out", str(tmp_path / "c")]
    with MockEngine(Settings()) as ours, MockEngine(Settings(gamma=3, chunk_tokens=2)) as theirs:
        status = certify.main(["--baseline-url", ours.url, "--candidate-url", theirs.url, *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, result["verdict"]) == (0, "identical")
    assert result["missing"]["row-matched"] == "there is no drafter here to take the rows of"


def test_endpoints_that_answer_from_their_prefix_cache_are_not_certified(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers are not kept either: the same command would take them for computed ones."""
    flags = ["--prompts", str(prompts_file), "--max-tokens", "2", "--concurrency", "2", "--out", str(tmp_path / "c")]
    with MockEngine() as ours, MockEngine(Settings(prefix_hits=16)) as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
        for _ in range(2):
            assert certify.main([*urls, *flags]) == 2
            said = capsys.readouterr().err
            assert "the prefix cache served 224 tokens of the candidate's prompts; start its server" in said
        theirs.settings = Settings()
        assert certify.main([*urls, *flags]) == 0
    assert len(theirs.bodies) == 3 * 14 + 14  # 14 were streamed, too


def test_another_control_is_not_continued_with(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its passes were those of the control that was named before."""
    flags = ["--prompts", str(prompts_file), "--max-tokens", "2", "--concurrency", "2", "--out", str(tmp_path / "c")]
    with MockEngine() as plain, MockEngine(Settings(gamma=3)) as first, MockEngine(Settings(gamma=3)) as other:
        urls = ["--baseline-url", plain.url, "--candidate-url", plain.url]
        assert certify.main([*urls, "--row-matched-url", first.url, *flags]) == 0
        assert certify.main([*urls, "--row-matched-url", other.url, *flags]) == 2
        assert other.bodies == []
    assert "got another one's; choose another --out or remove it" in capsys.readouterr().err


def test_passes_of_another_checkpoint_are_not_continued(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server behind a URL was started again, with other weights under the same name."""
    flags = ["--prompts", str(prompts_file), "--max-tokens", "2", "--concurrency", "1", "--out", str(tmp_path / "c")]
    with (
        MockEngine(Settings(listed_length=True, root="one")) as ours,
        MockEngine(Settings(listed_length=True)) as theirs,
    ):
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
        theirs.settings.die_after, theirs.settings.dies_with = 5, 503
        assert certify.main([*urls, *flags]) == 2
        theirs.settings = Settings(listed_length=True, root="another")
        asked = len(theirs.bodies)
        capsys.readouterr()
        assert certify.main([*urls, *flags]) == 2
        assert "got another one's; choose another --out or remove it" in capsys.readouterr().err
        assert len(theirs.bodies) == asked
        theirs.settings = Settings(listed_length=True)
        assert certify.main([*urls, *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: arm["root"] for name, arm in result["arms"].items()} == {
        "baseline": "one",
        "candidate": "somewhere/fake",
    }
    assert ", which serves one." in (tmp_path / "c" / "certificate.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-prompts", "99"], "expected at most 14, got 99"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--concurrency", "0"], "expected positive numbers like 1,3,7, got '0'"),
        (["--gamma", "9"], "gamma: expected 1 to 7"),
        (["--prompts", "none.jsonl"], "none.jsonl: expected a prompts file"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    engines: type[RoleEngine], run: Any, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    try:
        status, _, output = run(*more)
    except SystemExit as error:
        status, output = int(str(error.code)), capsys.readouterr().err
    assert status == 2
    assert message in output
    assert engines.started_roles == ()


@pytest.mark.slow
def test_passes_of_other_settings_are_refused(engines: type[RoleEngine], run: Any) -> None:
    assert run()[0] == 0
    status, _, output = run("--max-tokens", "11")
    assert status == 2
    assert "got another one's; choose another --out or remove it" in output


@pytest.mark.slow
def test_passes_that_something_else_computed_are_refused(
    engines: type[RoleEngine], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate would say of them that this machine's kernels made them, as it is now."""
    monkeypatch.setenv("LAGUNA_CPU_ISA", "avx2")
    assert run()[0] == 0
    monkeypatch.setenv("LAGUNA_CPU_ISA", "portable")
    status, _, output = run()
    assert status == 2
    assert "got another one's; choose another --out or remove it" in output
    monkeypatch.setenv("LAGUNA_CPU_ISA", "avx2")
    assert run()[0] == 0


@pytest.mark.slow
def test_ab_certifies_on_request(
    engines: type[RoleEngine], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompts", str(prompts_file), "--num-prompts", "9", "--max-tokens", "10", "--control", "2"]
    command = [*PAIR, *flags, "--sequential", "--certify", "--out", str(tmp_path / "ab")]
    engines.roles = {"candidate": Settings(gamma=3, chunk_tokens=3)}
    assert ab.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["certificate"]["verdict"] == "identical"
    assert json.loads((tmp_path / "ab" / "ab.json").read_text())["certificate"]["verdict"] == "identical"
    assert (tmp_path / "ab" / "certificate" / "certificate.html").exists()
    assert engines.started_roles == (*("baseline", "candidate", "baseline"), *("baseline", "row-matched", "candidate"))


@pytest.mark.slow
def test_ab_keeps_its_figures_when_the_certificate_cannot_be_made(
    engines: type[RoleEngine], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompts", str(prompts_file), "--num-prompts", "9", "--max-tokens", "10", "--control", "2"]
    engines.roles = {"candidate": Settings(gamma=3, chunk_tokens=3), "row-matched": Settings(die_after=0)}
    assert ab.main([*PAIR, *flags, "--sequential", "--certify", "--out", str(tmp_path / "ab")]) == 2
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["speedup"]["point"] is not None
    assert "out of memory" in result["certificate"]["reasons"][0]
