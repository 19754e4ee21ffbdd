"""The command that teaches a smaller LLaDA: agreement rises, an interruption changes nothing, bad input is refused."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.scripts.training import loop
from laguna_serve.scripts.training.diffusion.distil import DistilConfig, teach
from laguna_serve.scripts.training.diffusion.saving import write_checkpoint
from laguna_serve.scripts.training.minutes import MINUTES
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.run_dir import RunDirError

TOY = Path(__file__).resolve().parents[2] / "toy"
SHAPE = LladaConfig(
    d_model=32,
    n_heads=2,
    n_kv_heads=2,
    n_layers=2,
    mlp_hidden_size=24,
    vocab_size=512,
    embedding_size=512,
    mask_token_id=3,
    eos_token_id=4,
    max_sequence_length=300,
)


@pytest.fixture
def config(tmp_path: Path) -> DistilConfig:
    """A teacher, and as its student the same model with one layer."""
    torch.manual_seed(0)
    model = Llada(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    write_checkpoint(tmp_path / "teacher", SHAPE, model.state_dict(), TOY / "teacher")
    smaller = Llada(replace(SHAPE, n_layers=1))
    smaller.load_state_dict(model.state_dict(), strict=False)
    write_checkpoint(tmp_path / "student", smaller.config, smaller.state_dict(), TOY / "teacher")
    return DistilConfig(
        model=tmp_path / "teacher",
        student=tmp_path / "student",
        out=tmp_path / "out",
        text=str(TOY / "prompts.jsonl"),
        length=32,
        batch=4,
        steps=60,
        lr=3e-3,
    )


@pytest.mark.slow
def test_student_comes_closer(config: DistilConfig) -> None:
    result = teach(config)
    assert all(after > before for before, after in result.agreement.values())
    assert (config.out / "distillation.json").exists()
    assert not config.out.with_name("out.work").exists()


@pytest.mark.slow
def test_interrupted_run_gives_the_same_student(config: DistilConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, steps=12)
    teach(config)
    again = replace(config, out=config.out.with_name("again"))
    steps = iter(range(8))

    def interrupt() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "check_signals", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teach(again)
    assert not (again.out / "model.safetensors").exists()
    (again.out.with_name("again.work") / MINUTES).write_text("100")
    assert teach(again).minutes >= 100
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _weights(config, again)]
    assert digests[0] == digests[1]
    assert load_file(again.out / "model.safetensors")


def test_nothing_of_others_goes(config: DistilConfig, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="got one that is read; choose another --out"):
        teach(replace(config, out=config.student, work=tmp_path / "work"))
    with pytest.raises(RunDirError, match="got one with --out in it"):
        teach(replace(config, work=config.out))
    with pytest.raises(RunDirError, match="got one with other files"):
        teach(replace(config, work=config.model))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_state_of_a_student_that_has_changed_is_refused(config: DistilConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "check_signals", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teach(config)
    shutil.copy(config.model / "config.json", config.student)
    shutil.copy(config.model / "model.safetensors", config.student)
    with pytest.raises(RunDirError, match="another one's"):
        teach(config)


def _weights(*configs: DistilConfig) -> list[Path]:
    return [config.out / "model.safetensors" for config in configs]


def test_bad_input_is_refused(config: DistilConfig, tmp_path: Path) -> None:
    other = replace(SHAPE, vocab_size=500, embedding_size=500)
    write_checkpoint(tmp_path / "other", other, Llada(other).state_dict(), TOY / "teacher")
    with pytest.raises(DiffusionError, match="expected the teacher's 512 tokens and mask 3, got 500 and 3"):
        teach(replace(config, student=tmp_path / "other"))
    (tmp_path / "short.txt").write_text("def f(): pass\n" * 20)
    with pytest.raises(DiffusionError, match="expected more than 16 rows of 32 tokens, got"):
        teach(replace(config, text=str(tmp_path / "short.txt")))
    with pytest.raises(FlagError, match="--lr: expected a rate between 0 and 1, got 2"):
        replace(config, lr=2)
