"""The routed experts of a pruned Laguna layer: kept blocks, plain or in FP8, and how they are loaded.

The weights stay in the checkpoint's layout, so that loading them again in place is a plain copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from laguna_serve.kernels.sentinel_moe import sentinel_moe
from laguna_serve.plugins.formats.experts import FP8, PLAIN
from laguna_serve.plugins.formats.fp8 import DTYPE, count_blocks, gather_scales
from laguna_serve.plugins.pruning import Pruning
from laguna_serve.plugins.shards import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one sparse layer keeps.

    `pruning` and `index` are set when the base's experts are cut while loading.
    """

    kept_blocks: int
    block_size: int
    blocks_per_expert: int
    pruning: Pruning | None = None
    index: int = 0
    format: str = PLAIN


class SentinelExperts(nn.Module):
    """A sparse layer's routed experts: w13_blocks [n, 2, B, H], w2_blocks [n, B, H], block_start [E + 1] int32.

    In FP8 with w13_scales [n, 2, B, G] and w2_scales [n, B, G] in fp32, G = ⌈H / 128⌉. Of several ranks each holds a
    part of the blocks and gives a partial output.
    """

    block_start: torch.Tensor
    w13_scales: nn.Parameter | None
    w2_scales: nn.Parameter | None

    def __init__(self, num_experts: int, hidden_size: int, plan: LayerPlan, prefix: str, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.plan = plan
        self.prefix = prefix
        self.shard = shard
        n, B, fp8 = shard.count(plan.kept_blocks), plan.block_size, plan.format == FP8
        dtype, G = DTYPE if fp8 else torch.get_default_dtype(), count_blocks(hidden_size)
        self.w13_blocks = _make_parameter((n, 2, B, hidden_size), dtype)
        self.w2_blocks = _make_parameter((n, B, hidden_size), dtype)
        self.w13_scales = _make_parameter((n, 2, B, G), torch.float32) if fp8 else None
        self.w2_scales = _make_parameter((n, B, G), torch.float32) if fp8 else None
        bias = torch.zeros(num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        # Not a parameter, as vLLM's dummy loader fills these with noise: even shares until a checkpoint says otherwise.
        start = torch.arange(num_experts + 1, dtype=torch.int64) * plan.kept_blocks // num_experts
        if plan.pruning is not None:
            start = torch.from_numpy(plan.pruning.block_start(plan.index)).to(start)
        self.register_buffer("block_start", shard.narrow(start).to(torch.int32), persistent=False)
        self._blocks = ("w13_blocks", "w2_blocks", "w13_scales", "w2_scales")[: 4 if fp8 else 2]
        self._wanted = self._expected_names()
        self._missing = set(self._wanted)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights [T, k] fp32, ids [T, k] int32 → [T, H]."""
        return sentinel_moe(
            x,
            weights,
            ids,
            self.w13_blocks,
            self.w2_blocks,
            self.block_start,
            w13_scales=self.w13_scales,
            w2_scales=self.w2_scales,
            max_blocks_per_expert=self.shard.bound(self.plan.blocks_per_expert),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Load what the checkpoint has under `mlp.experts.`; vLLM's loader calls it, perhaps in several goes.

        Yields what was set, the blocks once all that makes them up has come: vLLM refuses to start without.
        """
        for name, tensor in weights:
            if name == "e_score_correction_bias":
                _load(self.e_score_correction_bias, tensor)
                yield name
                continue
            if name not in self._wanted:
                kinds = "with scales in FP8" if self.plan.format == FP8 else "unquantised"
                expected = f"kept blocks, or a base checkpoint with expert_pruning.keep_mask, {kinds}"
                raise self._mismatch(expected, name)
            if (tensor.dtype == DTYPE) != (self.plan.format == FP8 and not _is_other(name)):
                kinds = "values in FP8 and scales in another dtype" if self.plan.format == FP8 else "unquantised values"
                raise self._mismatch(kinds, f"{name} in {tensor.dtype}")
            if self.plan.pruning is not None:
                self._load_expert(name, tensor)
            elif name == "block_start":
                _load(self.block_start, self.shard.narrow(self._check_start(tensor)))
            else:
                parameter = getattr(self, name)
                whole = [self.plan.kept_blocks, *parameter.shape[1:]]
                if list(tensor.shape) != whole:
                    raise self._mismatch(f"{name} {whole}", list(tensor.shape))
                _load(parameter, tensor[self.shard.blocks])
            self._missing.discard(name)
            if not self._missing:
                self._missing = set(self._wanted)  # of the next time that weights are loaded
                yield from self._blocks

    def missing_tensors(self) -> list[str]:
        """List what has not come, while the blocks are not complete."""
        return sorted(self._missing)

    def _expected_names(self) -> frozenset[str]:
        if self.plan.pruning is None:
            return frozenset((*self._blocks, "block_start"))
        parts = ("weight", "weight_scale") if self.plan.format == FP8 else ("weight",)
        names = [f"{name}.{part}" for name in ("gate_proj", "up_proj", "down_proj") for part in parts]
        return frozenset(f"{expert}.{name}" for expert in range(self.num_experts) for name in names)

    def _load_expert(self, name: str, tensor: torch.Tensor) -> None:
        """Cut one matrix of one expert, or its scales, down to its kept blocks that are held here."""
        number, projection, part = name.split(".")
        expert, plan, shard = int(number), self.plan, self.shard
        assert plan.pruning is not None
        start, end = (int(edge) for edge in plan.pruning.block_start(plan.index)[expert : expert + 2])
        place: Any = slice(shard.count(start), shard.count(end))
        atoms = torch.from_numpy(plan.pruning.atoms(plan.index, expert)[shard.first(start) :: shard.ranks])
        rows = tensor.t() if projection == "down_proj" else tensor
        width, H = plan.block_size * plan.blocks_per_expert, self.w13_blocks.shape[-1]
        whole = (width, H) if part == "weight" else (count_blocks(width), count_blocks(H))
        if rows.shape != whole:
            raise self._mismatch(f"{name} {list(whole if rows is tensor else whole[::-1])}", list(tensor.shape))
        kept = rows[atoms] if part == "weight" else gather_scales(rows, atoms)
        if projection != "down_proj":
            place = (place, 0 if projection == "gate_proj" else 1)
        matrix = "w2" if projection == "down_proj" else "w13"
        _load(getattr(self, f"{matrix}_{'blocks' if part == 'weight' else 'scales'}"), kept, place)

    def _check_start(self, start: torch.Tensor) -> torch.Tensor:
        widths = start.diff()
        if start.numel() != self.num_experts + 1 or start[0] != 0 or start[-1] != self.plan.kept_blocks:
            expected = f"block_start of {self.num_experts + 1} entries from 0 to {self.plan.kept_blocks}"
            raise self._mismatch(expected, f"{start.numel()} from {int(start[0])} to {int(start[-1])}")
        if widths.min() < 0 or widths.max() > self.plan.blocks_per_expert:
            limit = f"0 to {self.plan.blocks_per_expert} blocks for every expert"
            raise self._mismatch(limit, f"{int(widths.min())} to {int(widths.max())}")
        return start

    def _mismatch(self, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.prefix}: expected {expected}, got {got}; make the checkpoint again")


def _load(tensor: torch.Tensor, *arguments: Any) -> None:
    """By the tensor's own loader, which vLLM replaces while it loads weights again."""
    getattr(tensor, "weight_loader", default_weight_loader)(tensor, *arguments)


def _make_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _load_blocks})
    return parameter


def _is_other(name: str) -> bool:
    """Scales and offsets, which are no FP8 values."""
    return name == "block_start" or name.endswith(("_scale", "_scales"))


def _load_blocks(param: torch.Tensor, loaded_weight: torch.Tensor, place: Any = ...) -> None:
    held = param.data[place]
    if held.shape != loaded_weight.shape:  # copied, it would be repeated
        raise ValueError(f"expected weights of {list(held.shape)}, got {list(loaded_weight.shape)}")
    held.copy_(loaded_weight)
