"""Pruned experts in memory: each kind of change against explicit arithmetic, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_laguna import make_tiny, read_config, save_tiny

from laguna_serve.plugins.formats.fp8 import dequantise_atoms
from laguna_serve.plugins.pruning import Pruning, PruningError, draw_random_mask, read_shape
from laguna_serve.scripts.checkpoints import compact
from laguna_serve.scripts.training.pruning.changes import Change, changed, choose_blocks, round_experts
from laguna_serve.scripts.training.pruning.losses import mean_loss, zeroed
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.scripts.training.pruning.teacher import join_layers
from laguna_serve.scripts.training.pruning.wholes import prune_experts

ROWS = [torch.arange(3, 40), torch.arange(60, 20, -1)]
# Of each of 4 experts, 4 groups of 2 atoms, the last atoms first.
INDICES = np.tile(np.arange(8)[::-1].reshape(4, 2), (2, 4, 1, 1)).astype(np.int64)
WHOLE = np.ones((2, 4, 4), dtype=bool)


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = make_tiny()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    return model, read_shape(model.config.to_dict(), "tiny")


def run_block(model: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
    """A sparse block's output [T, H] of inputs [T, H]."""
    with torch.no_grad():
        output: torch.Tensor = model.model.layers[layer].mlp(x[None])[0]
    return output


def give(experts: Any, expert: int, x: torch.Tensor, atoms: list[int]) -> torch.Tensor:
    """What some atoms of an expert give to one token."""
    gate, up = experts.gate_up_proj[expert].detach().chunk(2)
    strengths = F.silu(gate[atoms] @ x) * (up[atoms] @ x)
    return experts.down_proj[expert].detach()[:, atoms] @ strengths


def make_inputs() -> torch.Tensor:
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(3))


def keep_but(*gone: tuple[int, int]) -> Pruning:
    """All blocks of all experts but of those (layer, expert)."""
    keep = WHOLE.copy()
    for layer, expert in gone:
        keep[layer, expert] = False
    return Pruning(keep, INDICES)


def test_masks_cost_what_zeroed_weights_cost_and_are_undone(tiny: Any) -> None:
    model, shape = tiny
    pruning = Pruning(draw_random_mask(shape, 4, 0.5, 0), INDICES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = mean_loss(model, ROWS)
    with zeroed(model, shape, pruning):
        wanted = mean_loss(model, ROWS)
    with changed(model, shape, Change(pruning)):
        assert mean_loss(model, ROWS) == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(whole, rel=1e-4)
    with pytest.raises(KeyboardInterrupt), changed(model, shape, Change(pruning, closed=True)):
        raise KeyboardInterrupt
    assert mean_loss(model, ROWS) == whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_constants_stand_in_a_pruned_experts_place(tiny: Any) -> None:
    model, shape = tiny
    constants = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
    x, block = make_inputs(), model.model.layers[1].mlp
    _, weights, ids = block.gate(x)
    assert (ids == 2).any()
    with changed(model, shape, Change(keep_but((0, 2)), constants=constants)):
        got = run_block(model, 1, x)
    for token in range(7):
        parts = [
            weight
            * (torch.from_numpy(constants[0, 2]) if expert == 2 else give(block.experts, expert, x[token], [*range(8)]))
            for weight, expert in zip(weights[token].detach(), ids[token].tolist(), strict=True)
        ]
        wanted = 2.5 * sum(parts) + block.shared_experts(x[token][None])[0].detach()
        torch.testing.assert_close(got[token], wanted)


def test_router_does_not_see_experts_that_were_taken_from_it(tiny: Any) -> None:
    model, shape = tiny
    x, block = make_inputs(), model.model.layers[1].mlp
    bias = block.gate.e_score_correction_bias
    scores = torch.sigmoid(block.gate(x)[0]).detach()
    with changed(model, shape, Change(keep_but((0, 2), (0, 1)), closed=True)):
        got = run_block(model, 1, x)
    for token in range(7):
        chosen = sorted((0, 3), key=lambda e: -float(scores[token, e] + bias[e]))[:2]
        total = sum(scores[token, e] for e in chosen)
        parts = [scores[token, e] / total * give(block.experts, e, x[token], [*range(8)]) for e in chosen]
        torch.testing.assert_close(got[token], 2.5 * sum(parts) + block.shared_experts(x[token][None])[0].detach())


def test_repacked_routing_is_the_parents_where_nothing_is_pruned(tiny: Any) -> None:
    model, shape = tiny
    whole = mean_loss(model, ROWS)
    with changed(model, shape, Change(Pruning(WHOLE, INDICES), repacked=True)):
        assert mean_loss(model, ROWS) == pytest.approx(whole, rel=1e-6)


def test_repacked_blocks_take_what_pruned_ones_leave_free(tiny: Any) -> None:
    model, shape = tiny
    keep = WHOLE.copy()
    keep[0, :, 1:] = [[False, True, False], [True, True, False], [False, False, False], [True, False, True]]
    x, block = make_inputs(), model.model.layers[1].mlp
    bias = block.gate.e_score_correction_bias
    scores = torch.sigmoid(block.gate(x)[0]).detach()
    with changed(model, shape, Change(Pruning(keep, INDICES), repacked=True)):
        got = run_block(model, 1, x)
    for token in range(7):
        ranked = sorted(
            np.argwhere(keep[0]).tolist(), key=lambda b: (-float(scores[token, b[0]] + bias[b[0]]), b[0], b[1])
        )
        chosen = ranked[:8]  # 2 experts of a token × 4 blocks
        total = sum(scores[token, expert] for expert, _ in chosen)
        parts = [
            4
            * scores[token, expert]
            / total
            * give(block.experts, expert, x[token], INDICES[0, expert, group].tolist())
            for expert, group in chosen
        ]
        torch.testing.assert_close(got[token], 2.5 * sum(parts) + block.shared_experts(x[token][None])[0].detach())


def test_equal_blocks_are_taken_by_importance() -> None:
    # One token; expert 1 is best and has blocks 0 and 2 left, expert 0 follows with three.
    blocks = torch.tensor([[0, 1, 2], [0, -1, 2]])
    chosen = choose_blocks(torch.tensor([[0.2, 0.9]]), blocks, 3, 4)
    assert chosen[0].tolist() == [[True, True, False], [True, False, True]]
    assert choose_blocks(torch.tensor([[0.2, 0.9]]), blocks, 3, 99).sum() == 5, "no more than are left"


def test_rounded_experts_are_those_of_the_compact_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(make_tiny(hidden_size=160, dtype=torch.bfloat16).to(torch.bfloat16), tmp_path / "model")
    config = read_config(folder)
    shape = read_shape(config, "tiny")
    model = join_layers(Layers(folder, Weights(folder, config), torch.float32, torch.device("cpu")))
    round_experts(model, shape)
    flags = ["--random-mask", "0", "--block-size", "8", "--to", "fp8", "--out", str(tmp_path / "fp8")]
    assert compact.main([str(folder), *flags]) == 0
    capsys.readouterr()
    stored = {}
    for path in (tmp_path / "fp8").glob("*.safetensors"):
        stored |= load_file(path)
    for layer in shape.layers:
        experts, prefix = model.model.layers[layer].mlp.experts, f"model.layers.{layer}.mlp.experts"
        w13 = dequantise_atoms(stored[f"{prefix}.w13_blocks"], stored[f"{prefix}.w13_scales"])
        w2 = dequantise_atoms(stored[f"{prefix}.w2_blocks"], stored[f"{prefix}.w2_scales"])
        assert torch.equal(experts.gate_up_proj.data, w13.flatten(1, 2))
        assert torch.equal(experts.down_proj.data, w2.mT)


def test_joined_layers_are_the_model(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    folder = save_tiny(model, tmp_path / "model")
    layers = Layers(folder, Weights(folder, read_config(folder)), torch.float32, torch.device("cpu"))
    assert mean_loss(join_layers(layers), ROWS) == pytest.approx(mean_loss(model, ROWS), rel=1e-6)


def test_whole_experts_are_ranked_over_all_layers() -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.4], [9.0, 8.0, 7.0, 0.35]])
    assert np.argwhere(~prune_experts(scores, 0.5, 1)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 3]]
    # Two stay in every layer, whatever the others' scores.
    assert np.argwhere(~prune_experts(scores, 0.5, 2)).tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]
    with pytest.raises(PruningError, match=r"at most 0\.5 with 2 experts kept in every layer, got 0\.65"):
        prune_experts(scores, 0.65, 2)
