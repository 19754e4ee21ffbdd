"""TEA's gradient, added to the rest, is what autograd finds; which shared-out students it knows, and whole states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laguna_serve.scripts.training.dante.anchor import EmbeddingAnchor, check_sharing
from laguna_serve.scripts.training.dante.losses import Anchor, embedding_drift
from laguna_serve.scripts.training.dante.states import find_state
from laguna_serve.serving.kit.errors import CommandError


@pytest.mark.parametrize("kind", ["relative", "sum", "none"])
def test_gradient_is_autograds(kind: Anchor) -> None:
    torch.manual_seed(0)
    initial, factor = torch.randn(12, 5), 0.7
    weight = torch.nn.Parameter(initial.clone())
    anchor = EmbeddingAnchor(weight, kind)
    with torch.no_grad():
        weight.add_(torch.randn(12, 5))
    other = weight.detach().clone().requires_grad_()
    rest = torch.randn(12, 5)
    loss = factor * embedding_drift(other, initial, kind) + (rest * other).sum()
    loss.backward()
    weight.grad = rest.clone()
    term = anchor.pull(weight, factor)
    torch.testing.assert_close(weight.grad, other.grad)
    torch.testing.assert_close(term, (loss - (rest * other).sum()).detach())
    assert not term.requires_grad
    torch.testing.assert_close(anchor.measure(weight), embedding_drift(other.detach(), initial))


@pytest.mark.parametrize(("kind", "got"), [("FSDP", "FSDP 1"), ("DEEPSPEED", "DEEPSPEED")])
def test_student_shared_out_in_another_way_is_refused(kind: str, got: str) -> None:
    with pytest.raises(CommandError, match=f"expected DDP or FSDP 2, got {got}; launch with --multi_gpu, or"):
        check_sharing(kind, is_fsdp2=False)


@pytest.mark.parametrize(("kind", "is_fsdp2"), [("FSDP", True), ("MULTI_GPU", False), ("NO", False)])
def test_student_that_each_has_whole_or_in_parts_is_taken(kind: str, is_fsdp2: bool) -> None:
    check_sharing(kind, is_fsdp2=is_fsdp2)


def test_state_that_was_not_written_to_its_end_is_not_continued(tmp_path: Path) -> None:
    assert find_state(tmp_path) is None
    for step, said in ((9, "{}"), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if said is not None:
            (folder / "trainer_state.json").write_text(said)
    assert find_state(tmp_path) == str(tmp_path / "checkpoint-10")
