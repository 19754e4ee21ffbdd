"""One pass of the model over unlike row sets: other lengths, other blocks, with and without a cache.

A row's bits must not depend on what shares the pass, or a state that was proposed would not get the logits that it
gets alone. A product's rounding may depend on its number of rows, and that of an elementwise function on where vectors
end; so no operation here spans two row sets, and every shape follows from one of them alone. Layer by layer all row
sets are done before the next layer's weights are read. On processors that costs nothing that matters; a GPU would
want products over fixed, larger numbers of rows, which has not been tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Block, Llada, attend

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Keys and values [m, kv_heads, head] of m positions, a pair per layer.
Context = tuple[KeysValues, ...]


@dataclass(frozen=True, slots=True)
class RowSet:
    """What is computed together: positions that see each other, and those of a context.

    Attributes:
        ids: of the positions that are computed.
        first: the first one's position in the sequence; they follow each other.
        wanted: which of them need logits.
        keep: whether their keys and values are given back.
    """

    ids: tuple[int, ...]
    first: int
    wanted: slice
    context: Context | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class RowOutput:
    """Logits [wanted, vocabulary] fp32, and what was kept of the row set's own positions; empty if nothing was."""

    logits: torch.Tensor
    kept: Context


@runtime_checkable
class MaskModel(Protocol):
    """A model that runs its passes itself; what shares a pass may change its bits, so that it takes no proposals."""

    def run_pass(self, row_sets: Sequence[RowSet]) -> list[RowOutput]:
        """Compute the wanted logits of all row sets."""


@dataclass(slots=True)
class _Rows:
    """A row set on its way through the layers."""

    x: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor
    kept: list[KeysValues]


@torch.inference_mode()
def run_pass(model: Llada, row_sets: Sequence[RowSet]) -> list[RowOutput]:
    """Run the model once over all row sets.

    Raises:
        DiffusionError: a sequence is longer than the model's.
    """
    going = [_begin(model, rows) for rows in row_sets]
    for number, block in enumerate(model.blocks):
        for rows, at in zip(row_sets, going, strict=True):
            _run_layer(block, rows, at, rows.context[number] if rows.context else None)
    return [
        RowOutput(model.read_out(at.x[rows.wanted]), tuple(at.kept)) for rows, at in zip(row_sets, going, strict=True)
    ]


def _begin(model: Llada, rows: RowSet) -> _Rows:
    device, most = model.rotary.cosines.device, model.config.max_sequence_length
    end = rows.first + len(rows.ids)
    if end > most:
        raise DiffusionError(f"sequence: expected at most {most} tokens of prompt and canvas, got {end}; shorten it")
    cosines, sines = model.rotary(torch.arange(rows.first, end, device=device))
    return _Rows(model.embed(torch.tensor(rows.ids, device=device)), cosines, sines, [])


def _run_layer(block: Block, rows: RowSet, at: _Rows, around: KeysValues | None) -> None:
    q, k, v = block.project(at.x, at.cosines, at.sines)
    if rows.keep:
        at.kept.append((k, v))
    if around is not None:
        k, v = torch.cat([around[0], k]), torch.cat([around[1], v])
    at.x = block.finish(at.x, attend(q[None], k[None], v[None])[0])
