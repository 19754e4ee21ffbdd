"""How much each atom of each routed expert matters, measured on text.

An atom is one gate row, one up row and one down column.  For a token that the router sends to the expert, with routing
weight w (the routed scale included), the atom adds

    δ = w · silu(gate · x) · (up · x) · down

to the layer's output.  A score is a sum over such tokens, divided by the number of *all* tokens read: an expert that is
seldom chosen is of little importance, and scores compare between experts and between layers.

`loss_saliency` is, to second order and with the gradients' covariance in place of the Hessian (empirical Fisher), what
removing the atom adds to the mean loss in nats per token: ½ (g · δ)², g being the gradient of the row's loss with
regard to the layer's output at that token.  Atoms are taken one by one; that they err together is left out.
`output_saliency` needs no gradients: ‖δ‖², the output's own change, as if every direction in every layer were alike.

Source: the output-space view and the gradient covariance are HEAPr's (arXiv:2509.22299), which takes expectations of
the activations and of the gradients apart; here each token's own gradient meets its own activation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from laguna_serve.plugins.pruning import ExpertShape


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCall:
    """One expert's work on the n tokens of a row that were routed to it, all fp32.

    gate, up [N, H], down [H, N]: its weights.  x [n, H]: its inputs.  weights [n]: routing weights, scaled.
    grads [n, H]: gradient of the row's summed loss with regard to the layer's output.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    grads: torch.Tensor


# One expert's call → the scores of its atoms [N] fp32, summed over the call's tokens; higher is more important.
ScoreFunction = Callable[[ExpertCall], torch.Tensor]


def loss_saliency(call: ExpertCall) -> torch.Tensor:
    """½ Σ (g · δ)²: nats."""
    return 0.5 * (_strengths(call) * (call.grads @ call.down)).square().sum(0)


def output_saliency(call: ExpertCall) -> torch.Tensor:
    """Σ ‖δ‖²: squared units of the layer's output."""
    return _strengths(call).square().sum(0) * call.down.square().sum(0)


SCORES: dict[str, ScoreFunction] = {"loss": loss_saliency, "output": output_saliency}


def _strengths(call: ExpertCall) -> torch.Tensor:
    """[n, N]: the factor of each atom's down column in the layer's output."""
    return call.weights[:, None] * F.silu(call.x @ call.gate.t()) * (call.x @ call.up.t())


class _Tap:
    """Watches one layer's routed experts: what went in, and the gradient that comes back."""

    def __init__(self, block: Any) -> None:
        self.experts = block.experts
        self.scale = float(block.routed_scaling_factor)
        self.hook = block.experts.register_forward_hook(self._watch)
        self.inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.grads: torch.Tensor | None = None

    def _watch(self, _module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, ids, weights = (tensor.detach() for tensor in inputs)
        self.inputs = x, ids, weights
        output.register_hook(self._keep)

    def _keep(self, grads: torch.Tensor) -> None:
        self.grads = grads

    def add_scores(self, scores: torch.Tensor, score: ScoreFunction) -> None:
        """Add the last row's scores to scores [E, N]."""
        assert self.inputs is not None
        assert self.grads is not None
        x, ids, weights = self.inputs
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            gate, up = self.experts.gate_up_proj[expert].float().chunk(2)
            down = self.experts.down_proj[expert].float()
            # The layer scales what its experts give; the gradient here is before that, the atom's share after.
            grads = self.grads[rows].float() / self.scale
            call = ExpertCall(gate, up, down, x[rows].float(), weights[rows, slots].float() * self.scale, grads)
            scores[expert] += score(call)


def score_atoms(
    model: Any,
    shape: ExpertShape,
    rows: list[torch.Tensor],
    score: ScoreFunction,
    say: Callable[[str], None] = lambda _: None,
) -> npt.NDArray[np.float32]:
    """Scores [L, E, N] of a transformers Laguna: one forward and one backward pass per row of token ids."""
    model.eval().requires_grad_(False)
    taps = [_Tap(model.model.layers[layer].mlp) for layer in shape.layers]
    scores = torch.zeros(len(taps), shape.num_experts, shape.intermediate_size)
    started = last = time.monotonic()
    try:
        for done, row in enumerate(rows, 1):
            embedded = model.model.embed_tokens(row[None]).requires_grad_()
            logits = model(inputs_embeds=embedded).logits[0, :-1].float()
            F.cross_entropy(logits, row[1:], reduction="sum").backward()
            for tap, layer_scores in zip(taps, scores, strict=True):
                tap.add_scores(layer_scores, score)
            now = time.monotonic()
            if now - last > 5 or done == len(rows):
                last = now
                say(f"row {done}/{len(rows)}, {(now - started) / done * (len(rows) - done):.0f} s left")
    finally:
        for tap in taps:
            tap.hook.remove()
    scores /= sum(len(row) - 1 for row in rows)
    return scores.numpy()


def group_atoms(
    scores: npt.NDArray[np.float32], block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Sort each expert's atoms by falling score into groups: indices [L, E, G, B] int64, scores [L, E, G] fp32.

    A group's score is the sum of its atoms'.  Of equal atoms the earlier one comes first.
    """
    L, E, N = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    indices = order.reshape(L, E, N // block_size, block_size).astype(np.int64)
    return indices, ranked.reshape(indices.shape).sum(axis=-1, dtype=np.float64).astype(np.float32)
