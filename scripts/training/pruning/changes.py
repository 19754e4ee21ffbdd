"""Pruned experts in memory: what a mask changes of transformers' Laguna, for as long as a measurement lasts.

No weight is copied and none is written: the routed experts of each sparse layer are computed here instead, with the
pruned atoms' strengths at zero, which gives what zeroed weights give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from laguna_serve.plugins.formats.fp8 import dequantise_atoms, quantise_atoms
from laguna_serve.plugins.pruning import ExpertShape, Pruning


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is done to the experts of L sparse layers.

    Attributes:
        pruning: which blocks stay; an expert may have none here.
        constants: [L, E, H] what MoNE's experts give that have no block left; None: such experts give nothing.
        closed: the router no longer sees experts that have no block left (REAP).
        repacked: every kept block is routed to on its own (`Repacked`).
    """

    pruning: Pruning
    constants: npt.NDArray[np.float32] | None = None
    closed: bool = False
    repacked: bool = False

    @property
    def empty(self) -> npt.NDArray[np.bool_]:
        """[L, E]: experts without a block."""
        return np.logical_not(self.pruning.keep.any(axis=-1))

    def blocks(self, layer: int) -> torch.Tensor:
        """[E, N] int64: the block that each atom of a layer lies in; -1 of pruned atoms."""
        keep, indices = self.pruning.keep[layer], self.pruning.indices[layer]
        E, G, B = indices.shape
        numbers = np.where(keep, np.arange(G), -1)[..., None].repeat(B, axis=-1)
        found = np.empty((E, G * B), dtype=np.int64)
        np.put_along_axis(found, indices.reshape(E, -1), numbers.reshape(E, -1), axis=-1)
        return torch.from_numpy(found)


class Masked(torch.nn.Module):
    """Routed experts whose pruned atoms give nothing; what is left of each is weighted as the router weighted it."""

    def __init__(self, experts: Any, keep: torch.Tensor, constants: torch.Tensor | None) -> None:
        """Take the weights of `experts`. keep [E, N] bool; constants [E, H] beside them, zero where there are none."""
        super().__init__()
        self._weights = (experts.gate_up_proj.data, experts.down_proj.data)
        device, dtype = experts.down_proj.device, experts.down_proj.dtype
        self._keep = keep.to(device)
        self._constants = None if constants is None else constants.to(device, dtype)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the experts' outputs: x [T, H], ids and weights [T, K]."""
        output = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            if self._keep[expert].any():
                rows, slots = (ids == expert).nonzero(as_tuple=True)
                strengths = find_strengths(x[rows], self._weights[0][expert]) * self._keep[expert]
                output.index_add_(0, rows, strengths @ self._weights[1][expert].t() * weights[rows, slots, None])
        if self._constants is not None:
            output += (self._constants[ids] * weights[..., None]).sum(1)
        return output


class Repacked(torch.nn.Module):
    """Every kept block as an expert of its own, with its parent's logit: the top K·G of them for each token.

    K: experts of a token; G: blocks of an expert. A parent of high score brings all that is left of it, its most
    important block first; what its pruned blocks leave free goes to blocks of parents that the router would not have
    chosen. Weights are the routing scores over the sum of those chosen, times G: with nothing pruned, the parent's.
    """

    def __init__(self, block: Any, blocks: torch.Tensor, blocks_per_expert: int) -> None:
        super().__init__()
        # In a list: a module inside another one would be registered as its part.
        self._gate = [block.gate]
        self._weights = (block.experts.gate_up_proj.data, block.experts.down_proj.data)
        self._blocks = blocks.to(block.experts.down_proj.device)
        self._G = blocks_per_expert

    def forward(self, x: torch.Tensor, ids: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen blocks' outputs: x [T, H], ids [T, K] for their number alone."""
        gate, E = self._gate[0], len(self._blocks)
        scores = torch.sigmoid(gate(x)[0])
        chosen = choose_blocks(scores + gate.e_score_correction_bias, self._blocks, self._G, ids.shape[1] * self._G)
        kept = chosen.sum(-1)
        weights = (scores * self._G / (scores * kept).sum(-1, keepdim=True)).to(x.dtype)
        output = torch.zeros_like(x)
        for expert in range(E):
            (rows,) = kept[:, expert].nonzero(as_tuple=True)
            if len(rows):
                # Atoms of no block look up the last column, which says no.
                open_blocks = F.pad(chosen[rows, expert], (0, 1))
                strengths = find_strengths(x[rows], self._weights[0][expert]) * open_blocks[:, self._blocks[expert]]
                output.index_add_(0, rows, strengths @ self._weights[1][expert].t() * weights[rows, expert, None])
        return output


def choose_blocks(scores: torch.Tensor, blocks: torch.Tensor, blocks_per_expert: int, count: int) -> torch.Tensor:
    """Choose `count` kept blocks for each token, by the scores [T, E] of their experts; bool [T, E, G].

    Of equal blocks, as those of one expert are, the most important come first.
    """
    E, G = len(blocks), blocks_per_expert
    kept = (blocks[:, None, :] == torch.arange(G, device=blocks.device)[:, None]).any(-1)
    values = scores[..., None].expand(-1, E, G).masked_fill(~kept, float("-inf")).flatten(1)
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, : min(count, int(kept.sum()))]
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(1, order, True)
    return chosen.view(-1, E, G)


def find_strengths(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate · x) · (up · x) of every atom: x [T, H], gate_up [2N, H] → [T, N]."""
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    return F.silu(gate) * up


@contextmanager
def changed(model: Any, shape: ExpertShape, change: Change) -> Iterator[None]:
    """Change the experts of the model for as long as this lasts; at the end it is as it was."""
    parts = [model.model.layers[layer].mlp for layer in shape.layers]
    before = [(part.experts, part.gate.e_score_correction_bias.data) for part in parts]
    try:
        for layer, part in enumerate(parts):
            blocks, empty = change.blocks(layer), torch.from_numpy(change.empty[layer])
            if change.closed:
                part.gate.e_score_correction_bias.data = part.gate.e_score_correction_bias.data.masked_fill(
                    empty.to(part.gate.weight.device), float("-inf")
                )
            if change.repacked:
                part.experts = Repacked(part, blocks, change.pruning.blocks_per_expert)
            else:
                constants = None
                if change.constants is not None:
                    constants = torch.from_numpy(change.constants[layer]).masked_fill(~empty[:, None], 0)
                part.experts = Masked(part.experts, blocks >= 0, constants)
        yield
    finally:
        for part, (experts, bias) in zip(parts, before, strict=True):
            part.experts = experts
            part.gate.e_score_correction_bias.data = bias


def round_experts(model: Any, shape: ExpertShape) -> None:
    """Round the routed experts to FP8 as `laguna compact --to fp8` stores them, a scale for each atom's 128 columns.

    In place: the weights then are the dequantised values, in the model's dtype.
    """
    for layer in shape.layers:
        experts = model.model.layers[layer].mlp.experts
        for gate_up, down in zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True):
            for atoms in (gate_up, down.t()):
                rounded = quantise_atoms(atoms)
                atoms.copy_(dequantise_atoms(rounded.values, rounded.require_scale()))
