"""bench/ab.py as users ask: through the chat template, with answers that end by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ab_harness import PROMPTS, TIMED, RunAb, common_flags, mock_launchers
from mock_engine import MockEngine, Settings

from laguna_serve.bench import ab

ASKED = [f"<user>{text}" for text in PROMPTS]


def test_prompts_go_through_the_engines_own_template(prompts_file: Path, tmp_path: Path) -> None:
    with MockEngine() as baseline, MockEngine() as candidate:
        urls = ["--baseline-url", baseline.url, "--candidate-url", candidate.url]
        flags = [*common_flags(prompts_file, tmp_path), "--control", "0", "--chat", "--thinking", "on"]
        assert ab.main([*urls, *flags]) == 0
    sent = ["".join(map(chr, body["prompt"][1:])) for body in baseline.bodies if isinstance(body["prompt"], list)]
    assert sent[-len(TIMED) :] == [f"<user>{text}<think>" for text in TIMED]
    whole = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert whole["workload"]["chat_prompts"] == 10
    assert "10 through the chat template" in (tmp_path / "out" / "ab.md").read_text()


def test_answers_that_differ_are_examined_through_the_template_too(run_ab: RunAb) -> None:
    flips = {ASKED[3]: 5}
    _, result, _ = run_ab(Settings(flips=flips), Settings(), "--chat")
    (divergence,) = result["parity"]["divergences"]
    assert (divergence["index"], divergence["baseline_reproduced"]) == (5, True)
    assert "a margin of 0.01 nats" in divergence["reason"]


def test_a_template_that_refuses_is_named(
    run_ab: RunAb,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ab, "check_specs", lambda *_: None)  # which would find out first that no key is sent
    with MockEngine(Settings(key="k")) as engine:
        urls = ["--baseline-url", engine.url, "--candidate-url", engine.url, "--model", "fake"]
        assert ab.main([*urls, *common_flags(prompts_file, tmp_path), "--chat"]) == 2
    assert "as token ids of the chat template: request: HTTP 401" in capsys.readouterr().err


def test_answers_end_and_what_lies_past_the_end_is_counted_apart(run_ab: RunAb) -> None:
    ends = {text: 4 + index for index, text in enumerate(TIMED[:6])}
    drafting = Settings(chunk_tokens=4, gamma=7, ends=ends)
    status, result, output = run_ab(Settings(ends=ends), drafting, "--stop-at-eos")
    assert status == 0
    assert result["workload"]["ignore_eos"] is False
    tokens = sum(ends.values()) + 4 * 12
    for arm in ("baseline", "candidate"):
        assert (result["arms"][arm]["output_tokens"], result["arms"][arm]["ended"]) == (tokens, 6)
    # Forced, every answer has two drafts of which 3 are accepted; ended ones have fewer, and a last one cut short.
    assert result["forced_acceptance"]["length"] == pytest.approx(4.0)
    assert result["forced_acceptance"]["drafts"] == 20
    assert result["acceptance"]["drafts"] < 20
    assert "past end    4.00 tokens per step" in output
    assert "answers that ended by themselves" in output


def test_where_no_answer_ends_nothing_lies_past_it(run_ab: RunAb) -> None:
    _, result, output = run_ab(Settings(), Settings(chunk_tokens=4, gamma=7), "--stop-at-eos")
    assert "forced_acceptance" not in result
    assert "past end" not in output


def test_lengths_that_differ_are_a_mismatch_and_no_reason_to_withhold(run_ab: RunAb) -> None:
    _, result, _ = run_ab(Settings(ends={TIMED[0]: 6}), Settings(ends={TIMED[0]: 9}), "--stop-at-eos")
    assert result["parity"]["mismatches"] == 1
    assert result["refused"] == []
    assert (result["arms"]["baseline"]["output_tokens"], result["arms"]["candidate"]["output_tokens"]) == (114, 117)
    _, result, _ = run_ab(Settings(), Settings(shorten=1))
    assert "differ in length on 10 prompts" in result["refused"][0]["reason"]


def test_certificate_beside_an_ab_asks_the_same(prompts_file: Path, tmp_path: Path) -> None:
    with mock_launchers(pytest.MonkeyPatch(), Settings(), Settings()):
        config = ab.AbConfig(model="m", prompts=prompts_file, chat=True, thinking="off", out=tmp_path)
    beside = ab.beside(config, 3)
    assert (beside.chat, beside.thinking) == (True, "off")
