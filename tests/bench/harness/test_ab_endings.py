"""bench/ab.py when it cannot run, is interrupted, or loses an engine on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from ab_harness import RunAb, common_flags, mock_launchers, reasons
from mock_engine import MockEngine, Settings

from laguna_serve.bench import ab

AB = Path(ab.__file__).resolve()


def test_an_endpoint_without_token_ids_cannot_be_measured(run_ab: RunAb) -> None:
    status, _, output = run_ab(Settings(ids=False), Settings())
    assert status == 2
    assert "return_token_ids" in output
    assert len(output.strip().splitlines()) == 2


def test_nobody_at_the_address_cannot_be_measured(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["--baseline-url", "http://127.0.0.1:9", "--candidate-url", "http://127.0.0.1:9"]
    assert ab.main([*urls, *common_flags(prompts_file, tmp_path)]) == 2
    assert "is the engine up?" in capsys.readouterr().err


def test_an_engine_that_dies_leaves_its_cause_and_what_was_measured(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock_launchers(monkeypatch, Settings(), Settings(die_after=9, gamma=3, chunk_tokens=2)):
        status = ab.main(["--model", "m", "--draft", "d", *common_flags(prompts_file, tmp_path)])
    captured = capsys.readouterr()
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert status == 1
    assert result["partial"] is True
    assert "out of memory" in result["stopped"]
    assert "out of memory" in captured.err
    assert result["speedup"]["point"] is None
    assert result["arms"]["baseline"]["requests"] >= 5
    assert result["arms"]["baseline"]["tok_per_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(prompts_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(MockEngine(Settings(delay_s=0.005))) for _ in range(2)]
        urls = ["--baseline-url", engines[0].url, "--candidate-url", engines[1].url]
        command = [sys.executable, str(AB), *urls, *common_flags(prompts_file, tmp_path)]
        if number == signal.SIGTERM:  # as a background job of a shell script is started
            command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while len(engines[1].seen) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    result = json.loads(out.strip().splitlines()[-1])
    assert result["partial"] is True
    assert result["stopped"] == "interrupted"
    assert result["speedup"]["point"] is None
    assert "ended early (interrupted)" in reasons(result, "speedup")[0]
    assert result["parity"]["prompts"] >= 3
    assert result["arms"]["baseline"]["tok_per_s"] > 0
    assert "PARTIAL" in out
    assert (tmp_path / "out" / "ab.png").exists()


def test_answers_of_one_chunk_have_no_gaps_and_none_is_withheld(run_ab: RunAb) -> None:
    status, result, output = run_ab(Settings(), Settings(), "--max-tokens", "1")
    assert status == 0
    assert result["refused"] == []
    rows = [line.split() for line in output.splitlines() if line.startswith("gap per ")]
    assert [row[-2:] for row in rows] == [["none", "none"], ["none", "none"]]
