"""The order model: what it learns from, that it learns, what it proposes, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusion_models import make_canvases, make_model

from laguna_serve.plugins.diffusion.decoding.reference import PerStep, Reference
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.order import FEATURES, Ordered, OrderModel
from laguna_serve.plugins.diffusion.proposing.shapes import Chain
from laguna_serve.plugins.diffusion.proposing.sources import Stale
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation
from laguna_serve.scripts.training.diffusion.order import record, train_order
from laguna_serve.scripts.training.loop import Schedule

TARGET = make_model()
WARM = Reference(cache="dual", temperature=0.8, seed=3)


def start_order() -> OrderModel:
    torch.manual_seed(0)
    return OrderModel(TARGET.embedding.weight)


@pytest.mark.parametrize("reference", [Reference(), WARM, Reference(PerStep(2), cache="prefix")], ids=str)
def test_examples_are_the_references_steps(reference: Reference) -> None:
    examples = record(Decoder(Predictor(TARGET), reference), make_canvases(2))
    committed = reference.schedule.count(torch.zeros(8), 8)
    assert examples.features.shape == (len(examples), 8, FEATURES)
    assert torch.equal(examples.next.sum(-1), torch.full((len(examples),), committed))
    assert not (examples.next & ~examples.open).any()
    assert not (examples.right & ~examples.next).any()
    # Masked or committed since the logits: never both, and what is masked has a chosen token's log-probability.
    masked, since, chosen = examples.features[..., -2], examples.features[..., -1], examples.features[..., -3]
    assert torch.equal(masked.bool(), examples.open)
    assert not (masked * since).any()
    assert (chosen[examples.open] < 0).all()
    assert not chosen[~examples.open].any()


@pytest.mark.slow
def test_training_finds_the_order_and_saves_passes(tmp_path: Path) -> None:
    """On other prompts than it learnt from it needs fewer passes than the chain of falling confidence."""
    reference = Reference(cache="dual")
    model = start_order()
    canvases = make_canvases(60, length=32, block_length=16, seed=1)
    train_order(model, record(Decoder(Predictor(TARGET), reference), canvases), Schedule(200, 3e-3), 0, tmp_path / "s")
    passes = {}
    for name, proposer in (("order", Ordered(model)), ("chain", Chain(Stale()))):
        decoder = Decoder(Predictor(TARGET), reference, (), Speculation(proposer, states=3))
        runs = decoder.decode(make_canvases(8, length=32, block_length=16, seed=2))
        passes[name] = sum(run.passes for run in runs)
        assert sum(run.steps for run in runs) == 8 * 32
    assert passes["order"] < passes["chain"]


def test_proposals_fall_in_chance_and_are_states_of_the_block() -> None:
    reference = Reference(cache="dual")
    decoder = Decoder(Predictor(TARGET), reference)
    runs = [decoder.begin(canvas) for canvas in make_canvases(3)]
    proposer = Ordered(start_order().eval())
    assert proposer.propose(runs, 5) == [[], [], []]  # there are no logits yet
    for _ in range(3):
        decoder.advance(runs)
    for run, proposals in zip(runs, proposer.propose(runs, 5), strict=True):
        chances = [proposal.chance for proposal in proposals]
        assert len({proposal.state for proposal in proposals}) == len(proposals) == 5
        assert chances == sorted(chances, reverse=True)
        assert 0 < chances[-1] <= chances[0] <= 1
        for proposal in proposals:
            assert run.canvas.find_block(proposal.state) == run.canvas.find_block(run.state)
            kept = zip(run.state, proposal.state, strict=True)
            assert all(before in (after, run.canvas.mask_id) for before, after in kept)


def test_file_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    model = start_order().eval()
    model.save(tmp_path / "order.safetensors")
    again = OrderModel.load(tmp_path / "order.safetensors", TARGET.embedding.weight)
    features, tokens = torch.randn(2, 8, FEATURES), torch.randint(5, 90, (2, 8))
    assert torch.equal(model(features, tokens)[0], again(features, tokens)[0])
    with pytest.raises(DiffusionError, match="expected an order model of this target"):
        OrderModel.load(tmp_path / "order.safetensors", torch.zeros(100, 64))
    with pytest.raises(DiffusionError, match="expected an order model of this target"):
        OrderModel.load(tmp_path / "absent.safetensors", TARGET.embedding.weight)
