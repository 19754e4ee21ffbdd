"""Which layers and units of a LLaDA are least missed: one reading of the checkpoint, a layer in memory at a time.

Leave-one-block-out: for every contiguous block of so many layers the model without it runs beside the whole one, and
what is compared is the likeliest token at masked positions. A variant is the whole model up to its block and skips
that, so all of them go through a layer while its weights are there: memory holds the hidden states of every variant,
and of the weights one layer, the embedding and the head.

Source: the method is that of jaygala223/llada-distilled-24L-v3's model card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig, Tensors
from laguna_serve.plugins.diffusion.model import Block, Llada, Rotary
from laguna_serve.scripts.training.diffusion.masking import draw_masks, mask_rows
from laguna_serve.serving.kit.progress import Progress

RATIOS = (0.3, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Ablation:
    """What one reading of a checkpoint measured.

    Attributes:
        agreement: first layer of the block that is left out → ratio → share of masked positions at which the likeliest
            token is the whole model's.
        activations: of each layer, the mean |silu(gate) · up| of its units [wide] fp32.
    """

    agreement: dict[int, dict[float, float]]
    activations: tuple[torch.Tensor, ...]

    def find_expendable(self) -> int:
        """Find the block that is least missed over all ratios, of equal ones the first."""
        return min(self.agreement, key=lambda first: (-sum(self.agreement[first].values()), first))


@torch.inference_mode()
def ablate(
    tensors: Tensors,
    config: LladaConfig,
    rows: Sequence[torch.Tensor],
    left_out: int,
    dtype: torch.dtype,
    seed: int,
    progress: Progress | None = None,
) -> Ablation:
    """Measure every block of `left_out` layers on rows [n] int64, masked at each of `RATIOS`."""
    batches = list(_mask(config, rows, seed))
    firsts = range(config.n_layers - left_out + 1)
    embed, read_out = _load_ends(tensors, config, dtype)
    rotary = Rotary(config)
    whole = [embed(batch.ids) for batch in batches]
    waiting: dict[int, list[torch.Tensor]] = {}
    going: dict[int, list[torch.Tensor]] = {}
    activations = []
    for number, block in enumerate(iterate_blocks(tensors, config, dtype)):
        if number in firsts:
            waiting[number] = list(whole)
        if (resumed := number - left_out) in waiting:
            going[resumed] = waiting.pop(resumed)
        activations.append(_run_layer(block, rotary, whole))
        for states in going.values():
            _run_layer(block, rotary, states)
        if progress is not None:
            progress.step("layers", number + 1, config.n_layers)
    going |= waiting  # the last block, which nothing follows
    wanted = [read_out(x[b.masks]).argmax(-1) for x, b in zip(whole, batches, strict=True)]
    agreement = {}
    for first in firsts:
        same = [
            (read_out(x[b.masks]).argmax(-1) == best) for x, b, best in zip(going[first], batches, wanted, strict=True)
        ]
        agreement[first] = {
            ratio: float(torch.cat([s for s, b in zip(same, batches, strict=True) if b.ratio == ratio]).float().mean())
            for ratio in RATIOS
        }
    return Ablation(agreement, tuple(activations))


@dataclass(frozen=True, slots=True)
class _Batch:
    """One masked row [1, n], and where."""

    ratio: float
    ids: torch.Tensor
    masks: torch.Tensor


def _mask(config: LladaConfig, rows: Sequence[torch.Tensor], seed: int) -> Iterator[_Batch]:
    for number, row in enumerate(rows):
        for ratio in RATIOS:
            generator = torch.Generator().manual_seed(seed + number)
            masks = draw_masks((1, len(row)), torch.tensor([ratio]), generator)
            yield _Batch(ratio, mask_rows(row[None], masks, config.mask_token_id), masks)


def _run_layer(block: Block, rotary: Rotary, states: list[torch.Tensor]) -> torch.Tensor:
    """Take all rows [1, n, d] through a layer, in place; the mean activation of its units [wide]."""
    total, count = torch.zeros(block.ff_proj.out_features), 0
    seen: list[torch.Tensor] = []
    handle = block.ff_out.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for number, x in enumerate(states):
        cosines, sines = rotary(torch.arange(x.shape[1]))
        states[number] = block(x, cosines, sines, False)
        units = seen.pop()
        total += units.float().abs().sum((0, 1))
        count += units.shape[1]
    handle.remove()
    return total / max(1, count)


def iterate_blocks(tensors: Tensors, config: LladaConfig, dtype: torch.dtype) -> Iterator[Block]:
    """Load one layer after the other; the one before is gone when the next comes."""
    for number in range(config.n_layers):
        with torch.device("meta"):
            block = Block(config)
        _fill(block, f"model.transformer.blocks.{number}.", tensors, dtype)
        yield block


def _load_ends(tensors: Tensors, config: LladaConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load what is before the layers and behind them: ids → x, and x → logits."""
    with torch.device("meta"):
        ends = Llada(replace(config, n_layers=0))
    _fill(ends, "", tensors, dtype)
    return ends.embed, ends.read_out


def _fill(module: nn.Module, prefix: str, tensors: Tensors, dtype: torch.dtype) -> None:
    for name, empty in module.state_dict().items():
        tensor = tensors.read(prefix + name, tuple(empty.shape), dtype)
        module.load_state_dict({name: tensor}, strict=False, assign=True)
    module.eval()
