"""The target that a drafter is trained for, a decoder layer at a time, whichever way its checkpoint is stored.

Read are: Laguna as published, a mixture or dense, in bf16, fp16, fp32 or FP8 (128×128 blocks); a dense model at its
layers' true widths (`laguna unpad`); a mixture whose experts are cut down to their kept blocks (`laguna compact`), in
plain numbers or FP8.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.laguna.modeling_laguna import LagunaDecoderLayer

from laguna_serve.kernels.sentinel_moe import sentinel_moe_reference
from laguna_serve.plugins.formats.experts import FP8
from laguna_serve.plugins.formats.fp8 import dequantise_atoms
from laguna_serve.plugins.layers import SPARSE, read_widths
from laguna_serve.scripts.training.pruning.streaming.layers import Head, Layers
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.serving.checkpoint import read_config, read_target

REMEDY = (
    "pass the release in FP8 as the target, or in bf16 where config.json has no transform_config here: its drafter fits"
    " this one as well"
)
BLOCKS = re.compile(r"(.+\.mlp\.experts\.)(w13|w2)_blocks")
BLOCK_START = ".block_start"


class BlockExperts(nn.Module):
    """The routed experts of a compact checkpoint, called as transformers' are; blocks as `sentinel_moe` has them."""

    def __init__(self, blocks: int, block_size: int, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("w13_blocks", torch.empty(blocks, 2, block_size, hidden_size))
        self.register_buffer("w2_blocks", torch.empty(blocks, block_size, hidden_size))
        self.register_buffer("block_start", torch.empty(num_experts + 1, dtype=torch.int32))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the output [T, H] of the chosen experts `ids` [T, K], weighted, before the layer's scale."""
        parts = (self.get_buffer(name) for name in ("w13_blocks", "w2_blocks", "block_start"))
        return sentinel_moe_reference(x, weights, ids, *parts)


class TargetLayers(Layers):
    """Loads pieces of any Laguna target in one dtype on one device."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read config and headers.

        Raises:
            CheckpointError: no Laguna, or one whose numbers cannot be read here.
        """
        described, self.target = read_config(folder), read_target(folder)
        self._widths = read_widths(described, str(folder))
        super().__init__(folder, Weights(folder, described, REMEDY), dtype, device)

    @property
    def count(self) -> int:
        """Decoder layers of the target."""
        return self.target.num_layers

    def load_shared(self) -> tuple[torch.Tensor, Head]:
        """Load what a drafter shares with the target: its embedding [V, H] and its head."""
        return self.load_embedding(), self.load_head()

    def _build(self, number: int) -> Any:
        config, experts = self.config, self.target.experts
        if self._widths is not None:
            config = copy.copy(config)
            config.intermediate_size = self._widths[number]
        with torch.device("meta"):
            layer = LagunaDecoderLayer(config, number)
            if experts is not None and self.target.mlp_kinds[number] == SPARSE:
                kept = experts.kept_blocks[self.target.mlp_kinds[:number].count(SPARSE)]
                sizes = (experts.block_size, self.target.hidden_size, self.target.num_experts)
                layer.mlp.experts = BlockExperts(kept, *sizes)
        return layer

    def _read(self, name: str, keep: bool = False) -> torch.Tensor:
        match, experts = BLOCKS.fullmatch(name), self.target.experts
        if match is None or experts is None or experts.format != FP8:
            return super()._read(name, keep or name.endswith(BLOCK_START))
        scales = self.weights.read_stored(f"{match[1]}{match[2]}_scales")
        return dequantise_atoms(self.weights.read_stored(name), scales).to(self.device, self.dtype)
