"""bench/cluster: what its checks need of a checkpoint is looked at before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.bench.cluster.__main__ import require_swappable, write_swapped
from laguna_serve.serving.checkpoint import CheckpointError

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.mark.parametrize("name", ["llada", "nowhere"])
def test_checkpoint_without_matrices_to_swap_is_refused(name: str) -> None:
    """Of another family's it was a KeyError."""
    with pytest.raises(CheckpointError, match=r"expected model\.layers\.1\..* in model\.safetensors, got none"):
        require_swappable(TOY / name)


@pytest.mark.slow
def test_toy_teacher_can_be_swapped(tmp_path: Path) -> None:
    require_swappable(TOY / "teacher")
    swapped = write_swapped(TOY / "teacher", tmp_path / "swapped") / "model.safetensors"
    assert swapped.read_bytes() != (TOY / "teacher" / "model.safetensors").read_bytes()
