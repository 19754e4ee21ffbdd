"""A GRPO run's folder that is not continued: of other checkpoints, for fewer steps, or while another run is at it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from laguna_serve.scripts.training.rl import run
from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.sources import check_sources, note_sources
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.files import WriteError
from laguna_serve.serving.kit.run_dir import RunDirError, hold_folder

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOY / "teacher", tmp_path / "teacher"))


@pytest.mark.parametrize("changed", ["model", "draft"])
def test_checkpoints_written_anew_under_the_same_path_are_told(tmp_path: Path, teacher: Path, changed: str) -> None:
    drafter = Path(shutil.copytree(TOY / "dflash", tmp_path / "dflash"))
    names = str(teacher), str(drafter)
    check_sources(tmp_path, names)  # a run of an earlier version has noted nothing
    note_sources(tmp_path, names)
    check_sources(tmp_path, names)
    folder = teacher if changed == "model" else drafter
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"expected {folder} as it was when this run began, got other"):
        check_sources(tmp_path, names)


@pytest.mark.slow
def test_a_run_is_not_cut_to_fewer_steps_nor_taken_over(tmp_path: Path, teacher: Path) -> None:
    """Its last line and its result went: the reward of another step stood there as that of the last."""
    from laguna_serve.scripts.training.rl.off_policy.importance import Correction
    from laguna_serve.scripts.training.rl.trainer import Trainer

    config = GrpoConfig(model=str(teacher), out=tmp_path / "out", steps=4)
    config.out.mkdir()
    trainer = Trainer.open(
        teacher, config.out, lr=config.lr, correction=Correction(2.0, None), decisive=config.decisive
    )
    trainer.step = 5
    trainer.save()
    with pytest.raises(CheckpointError, match="out: expected at least 5 --steps, as many as it has taken, got 4; give"):
        run.train_policy(config)
    with pytest.raises(CheckpointError, match=r"got another run's \(lr 0.0002, not 0.001\); choose another --out"):
        run.train_policy(replace(config, lr=1e-3))
    with hold_folder(config.out), pytest.raises(RunDirError, match="expected to write alone, got another run at it"):
        run.train_policy(config)
    (config.out / "state.pt").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"state\.pt: expected the state of a run, got one that cannot be read"):
        run.train_policy(config)


def test_a_version_for_which_the_disk_has_no_room_is_one_line(tmp_path: Path) -> None:
    """It ended in safetensors' traceback, and left a folder with a config.json."""
    from laguna_serve.scripts.training.rl.policy import write_version

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(WriteError, match="step-1: expected to write it, got no space left; free some and repeat"):
        write_version(Full(), Full(), tmp_path / "step-1")  # type: ignore[arg-type]
    assert not (tmp_path / "step-1").exists()
