"""A checkpoint that a command writes whole or not at all (scripts/checkpoints/output.py)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from laguna_serve.scripts.checkpoints.output import JOURNALS, PARTIAL, is_free, save_checkpoint
from laguna_serve.serving.checkpoint import CheckpointError


def save(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"new {name}")


def test_checkpoint_is_whole_before_its_config_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, renamed = tmp_path / "out", []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        if Path(target).parent == out and not Path(target).name.endswith(PARTIAL):
            renamed.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    save_checkpoint(out, save)
    assert renamed == ["model.safetensors", "tokenizer.json", "config.json"]
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_weights_of_an_earlier_one_go_and_its_other_files_stay(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "distil_dense.json"):
        (tmp_path / name).write_text("old")
    save_checkpoint(tmp_path, save)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "distil_dense.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "model.safetensors").read_text() == "new model.safetensors"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left; free some and repeat the command"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_what_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, error: Exception, says: str) -> None:
    save_checkpoint(tmp_path / "out", save)

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise error

    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "out", fail)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "new config.json"


def test_what_a_killed_run_has_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "model.safetensors").write_text("half")
    assert is_free(tmp_path)
    assert is_free(tmp_path / "missing")
    save_checkpoint(tmp_path, save)
    assert not (tmp_path / PARTIAL).exists()
    assert not is_free(tmp_path)


@pytest.mark.parametrize("journal", JOURNALS)
def test_folder_of_a_run_that_was_killed_at_once_is_free(tmp_path: Path, journal: str) -> None:
    """Before its first journal was in place: the same command continues."""
    (tmp_path / f".{journal}.partial").write_text("{")
    assert is_free(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    assert not is_free(tmp_path)
