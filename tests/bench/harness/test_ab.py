"""bench/ab.py from command line to files, against fake engines: what is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ab_harness import TIMED, RunAb, common_flags, mock_launchers, reasons
from mock_engine import Clock, MockEngine, Settings

from laguna_serve.bench import ab
from laguna_serve.serving.kit.flags import read_flags

TEACHER = Path(__file__).resolve().parents[2] / "toy" / "teacher"


def make_config(*flags: str) -> ab.AbConfig:
    return read_flags(ab.AbConfig, flags, prog="bench/ab.py", description=None)


@pytest.mark.slow
@pytest.mark.usefixtures("draws")
def test_a_faster_equal_candidate_holds(run_ab: RunAb, tmp_path: Path, clock: Clock) -> None:
    slow, quick = Settings(delay_s=0.002, clock=clock), Settings(delay_s=0.002, clock=clock, chunk_tokens=4, gamma=7)
    status, result, output = run_ab(slow, quick)
    assert status == 0
    assert result["schema"] == "laguna_serve.ab/1"
    assert result["refused"] == []
    assert result["partial"] is False
    assert result["speedup"]["point"] == pytest.approx(4)  # a step takes as long, and brings four tokens
    assert result["speedup"]["ci95"] == pytest.approx([4, 4])
    assert result["speedup"]["pairs"] == 10
    assert result["parity"]["mismatches"] == 0
    assert result["parity"]["bound95"] == pytest.approx(1 - 0.05 ** (1 / 10))
    assert result["parity"]["control"] == {"prompts": 3, "mismatches": 0}
    assert result["arms"]["baseline"]["output_tokens"] == 120
    assert result["arms"]["candidate"]["tokens_per_chunk"]["mean"] == 4
    assert "identical on 10 of 10 prompts" in output
    for name in ("ab.json", "ab.md", "ab.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500


def test_acceptance_length_is_not_gamma_plus_one(run_ab: RunAb) -> None:
    _, result, _ = run_ab(Settings(), Settings(chunk_tokens=4, gamma=7))
    # 12 tokens: a first chunk of 4, then two drafts of 7 of which 3 were accepted each
    assert result["acceptance"]["length"] == pytest.approx(4.0)
    assert result["acceptance"]["rate"] == pytest.approx(3 / 7)
    assert result["acceptance"]["per_position"] == [1, 1, 1, 0, 0, 0, 0]
    counters = result["arms"]["candidate"]["counters"]
    assert counters["draft_tokens"] / counters["drafts"] + 1 == 8


def test_the_file_keeps_every_request_and_the_line_does_not(run_ab: RunAb, tmp_path: Path) -> None:
    _, line, output = run_ab(Settings(), Settings())
    whole = json.loads((tmp_path / "out" / "ab.json").read_text())
    timed = whole["requests"]["baseline"]["timed"]
    assert [record["prompt_id"] for record in timed] == [f"p{i}" for i in range(10)]
    assert all(len(record["token_ids"]) == 12 for record in timed)
    assert "requests" not in line
    others = ("{", "files in", "ab.py: warning: other processes")  # the last one on a machine with other work
    assert max(len(row) for row in output.splitlines() if not row.startswith(others)) <= 100


def test_warm_up_prompts_are_not_timed_and_arms_take_turns(prompts_file: Path, tmp_path: Path) -> None:
    with MockEngine() as ours, MockEngine() as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
        assert ab.main([*urls, *common_flags(prompts_file, tmp_path), "--control", "0"]) == 0
    assert set(ours.seen[:4]).isdisjoint(TIMED)
    assert ours.seen[4:] == TIMED == theirs.seen[4:]
    whole = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert sorted(item["first"] for item in whole["speedup"]["per_round"]) == ["baseline"] * 5 + ["candidate"] * 5


def test_as_many_warm_up_prompts_as_asked_for_and_the_page_says_so(prompts_file: Path, tmp_path: Path) -> None:
    with MockEngine() as ours, MockEngine() as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
        flags = [*common_flags(prompts_file, tmp_path), "--control", "0", "--num-warmups", "9"]
        assert ab.main([*urls, *flags]) == 0
    assert set(ours.seen[:9]).isdisjoint(TIMED)
    assert ours.seen[9:] == TIMED == theirs.seen[9:]
    assert json.loads((tmp_path / "out" / "ab.json").read_text())["workload"]["num_warmups"] == 9
    assert "concurrency 1, after 9 untimed ones" in (tmp_path / "out" / "ab.md").read_text()


def test_in_waves_the_next_prompt_is_sent_as_one_ends(prompts_file: Path, tmp_path: Path) -> None:
    """Ten prompts in rounds of six and four, two under way: the engine answers no first one before a second came."""
    with MockEngine(Settings(together=2)) as ours, MockEngine() as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", theirs.url]
        flags = [*common_flags(prompts_file, tmp_path), "--control", "5", "--concurrency", "2", "--waves", "3"]
        assert ab.main([*urls, *flags]) == 1, "two rounds give no interval"
    assert ours.most == 2
    assert sorted(ours.seen[-16:-6]) == sorted(TIMED)
    assert sorted(ours.seen[-6:]) == sorted(TIMED[:6]), "the control is of whole rounds"
    whole = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert whole["workload"]["waves"] == 3
    assert whole["speedup"]["pairs"] == 2
    page = (tmp_path / "out" / "ab.md").read_text()
    assert "concurrency 2, rounds of 3 waves" in page
    assert "paired over 2 rounds" in page


def test_urls_may_end_as_openais_clients_want_them(prompts_file: Path, tmp_path: Path) -> None:
    with MockEngine() as ours, MockEngine() as theirs:
        urls = ["--baseline-url", f"{ours.url}/v1", "--candidate-url", f"{theirs.url}/v1/"]
        assert ab.main([*urls, *common_flags(prompts_file, tmp_path), "--control", "0"]) == 0


def test_rounds_pair_prompts_sent_together(run_ab: RunAb) -> None:
    status, result, output = run_ab(Settings(), Settings(), "--concurrency", "4")
    assert status == 1
    assert result["speedup"]["pairs"] == 3
    assert result["speedup"]["ci95"] is None
    assert result["speedup"]["point"] is not None
    assert "at least 8 pairs" in reasons(result, "speedup.ci95")[0]
    assert "3 rounds" in output


def test_a_stream_cut_anywhere_is_read_whole(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(split_bytes=5), Settings(chunk_tokens=3))
    assert status == 0
    assert result["parity"]["mismatches"] == 0


@pytest.mark.parametrize("sequential", [False, True], ids=["interleaved", "sequential"])
def test_arms_started_here_differ_in_the_drafter_alone(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequential: bool
) -> None:
    drafter = Settings(gamma=3, chunk_tokens=2, flips={TIMED[1]: 4}, margin=0.0)
    flags = ["--model", "m", "--draft", "d", "--gamma", "3", *common_flags(prompts_file, tmp_path)]
    with mock_launchers(monkeypatch, Settings(margin=0.0), drafter) as made:
        assert ab.main([*flags, *(["--sequential"] if sequential else [])]) == 0
    baseline, candidate = made.configs[:2]
    assert (candidate.draft, candidate.gamma) == ("d", 3)
    assert (baseline.draft, baseline.gamma) == (None, None)
    assert baseline.prefix_caching is candidate.prefix_caching is False
    assert made.started == (3 if sequential else 2)  # the baseline comes back to be asked about the divergence
    whole = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert whole["workload"]["interleaved"] is not sequential
    assert whole["parity"]["classes"] == {"tie": 1, "near_tie": 0, "defect": 0}
    assert whole["arms"]["candidate"]["memory"]["pss_bytes"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline-url", "http://x"], "expected both or neither"),
        (["--model", "m", "--gamma", "3"], "expected --draft beside it"),
        ([], "expected a checkpoint, or two URLs"),
        (["--model", "m", "--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
    ],
)
def test_a_bad_command_line_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ab.main([*flags, "--prompts", "x.jsonl", "--out", "out"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_is_a_default_that_flags_override() -> None:
    flags = ["--model", "m", "--prompts", "p", "--out", "o"]
    quick = make_config(*flags, "--quick", "--max-tokens", "7")
    assert (quick.max_tokens, quick.control) == (7, 4)
    full = make_config(*flags)
    assert (full.max_tokens, full.control) == (128, 16)


@pytest.mark.parametrize(("flags", "timed"), [([], 30), (["--quick"], 16), (["--quick", "--num-prompts", "5"], 5)])
def test_quick_takes_sixteen_prompts_at_most(tmp_path: Path, flags: list[str], timed: int) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(30)))
    plan, _ = ab.prepare(make_config("--model", str(TEACHER), "--prompts", str(path), "--out", "o", *flags))
    assert len(plan.prompts) == timed
    assert len(plan.warmup) == 4
