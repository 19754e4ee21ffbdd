"""A file in --out gets its folders made, as a folder in --out does; where there can be none, one line says so."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from laguna_serve.serving.gateway.traces.store import TraceFile

TOY = Path(__file__).resolve().parents[1] / "toy"
SCORES = str(TOY / "masks" / "group_scores_importance_sorted.npy")
# (flags, the flag that names the file)
COMMANDS = {
    "scripts.toy_text": (["--prompts", "2"], "--out"),
    "scripts.long_prompts": (["--model", str(TOY / "teacher"), "--tokens", "64", "--count", "1"], "--out"),
    "scripts.pruning_mask": ([SCORES, "--share", "0.2"], "--out"),
    "serving.commands.traces": (["export", "traces.db"], "--out"),
    "bench.campaign": ([], "--write-todo"),
}


@pytest.fixture(autouse=True)
def _traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of no traces, where the command looks for it."""
    monkeypatch.chdir(tmp_path)
    TraceFile(tmp_path / "traces.db", 1 << 20).close()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_folders_of_a_file_are_made(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, flag = COMMANDS[name]
    run = importlib.import_module(f"laguna_serve.{name}").main
    assert run([*flags, flag, "out/deep/file"]) == 0
    assert [path.name for path in (tmp_path / "out" / "deep").iterdir()] == ["file"]
    (tmp_path / "mine").write_text("mine")
    capsys.readouterr()
    assert run([*flags, flag, "mine/file"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{flag} mine: expected a folder, got the file mine; choose another" in error
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "scripts.pruning_mask"])  # NumPy seeks
def test_a_pipe_is_written_to(name: str, tmp_path: Path) -> None:
    flags, flag = COMMANDS[name]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert importlib.import_module(f"laguna_serve.{name}").main([*flags, flag, "pipe"]) == 0
    assert os.read(reader, 100) or name == "serving.commands.traces"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "traces.db"]
