"""bench/ab.py withholds figures that would mislead, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ab_harness import TIMED, RunAb, common_flags, mock_launchers, reasons
from mock_engine import Settings

from laguna_serve.bench import ab


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("http_500", "out of luck"),
        ("error_event", "engine core died"),
        ("truncate", "closing [DONE]"),
        ("no_done", "closing [DONE]"),
        ("wrong_usage", "as usage says"),
    ],
)
def test_a_failed_request_withholds_the_figures(run_ab: RunAb, fault: str, message: str) -> None:
    status, result, output = run_ab(Settings(), Settings(faults={TIMED[3]: fault}))
    assert status == 1
    assert message in reasons(result, "speedup")[0]
    assert result["speedup"]["point"] is result["speedup"]["ci95"] is result["parity"]["bound95"] is None
    assert result["arms"]["candidate"]["tok_per_s"] is result["arms"]["candidate"]["itl_ms"] is None
    assert result["arms"]["baseline"]["tok_per_s"] > 0
    assert result["parity"]["prompts"] == 9
    assert "withheld figures" in output


def test_a_control_that_failed_is_withheld_and_said(run_ab: RunAb) -> None:
    """A server that died behind the timed rounds: the control that was asked for was left out without a word."""
    status, result, output = run_ab(Settings(die_after=15), Settings())
    assert status == 1
    assert "1 of the control's requests failed (prompt p1: " in reasons(result, "parity.control")[0]
    assert result["parity"]["control"] is None
    assert "control     refused (see below)" in output
    assert result["speedup"]["point"] > 0
    assert reasons(result, "speedup") == []


def test_prefix_cache_hits_withhold_the_figures(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(), Settings(prefix_hits=16))
    assert status == 1
    assert "prefix cache served 160 tokens" in reasons(result, "speedup")[0]
    assert reasons(result, "acceptance") == reasons(result, "arms.candidate") == reasons(result, "speedup")
    assert reasons(result, "arms.baseline") == []


def test_traffic_of_others_withholds_the_figures(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(foreign_tokens=5), Settings())
    assert status == 1
    assert "170 tokens in 10 requests counted, 120 in 10 sent here" in reasons(result, "arms.baseline")[0]


def test_different_prompt_tokens_withhold_speedup_and_parity(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(), Settings(prompt_shift=1))
    assert status == 1
    assert "different prompt tokens on 10 prompts" in reasons(result, "parity")[0]
    assert result["parity"]["mismatches"] is None
    assert result["parity"]["divergences"] == []


def test_different_lengths_withhold_the_speedup(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(), Settings(shorten=2))
    assert status == 1
    assert "differ in length on 10 prompts" in reasons(result, "speedup")[0]
    assert result["parity"]["classes"]["defect"] == 10
    assert len(result["parity"]["divergences"]) == 5  # the line is short; the file has all


def test_answers_that_end_early_withhold_the_speedup(run_ab: RunAb) -> None:
    """As of a server that does not know ignore_eos: both arms' lengths agree."""
    status, result, _ = run_ab(Settings(shorten=2), Settings(shorten=2))
    assert (status, result["speedup"]["point"]) == (1, None)
    for name, reason in zip(("baseline", "candidate"), reasons(result, "speedup"), strict=True):
        assert reason.startswith(f"10 of the {name}'s answers ended before the tokens that were asked for (prompt p")
        assert reason.endswith(": 10 of 12): ignore_eos is not obeyed")


def test_answers_that_are_to_be_shorter_do_not_end_early(run_ab: RunAb, prompts_file: Path) -> None:
    lines = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    prompts_file.write_text("".join(json.dumps({**line, "max_tokens": 7}) + "\n" for line in lines))
    assert run_ab(Settings(), Settings())[1]["refused"] == []


def test_a_drafter_that_never_drafts_withholds_the_speedup(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock_launchers(monkeypatch, Settings(), Settings(gamma=3, count_drafts=False)):
        assert ab.main(["--model", "m", "--draft", "d", *common_flags(prompts_file, tmp_path)]) == 1
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert reasons(result, "speedup") == reasons(result, "acceptance") == ["a drafter was configured but never drafted"]
