"""What a DFlash drafter is made of: its config.json, and which positions a block of its may look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from laguna_serve.plugins.formats.sequential_head import read_rank
from laguna_serve.plugins.layers import FULL, SLIDING
from laguna_serve.scripts.checkpoints.drafters.layout import (
    describe_laguna,
    read_block_size,
    read_layer_types,
    read_rope,
)
from laguna_serve.serving.checkpoint import ConfigJson
from laguna_serve.serving.kit.results import JsonObject

MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class DrafterShape:
    """What a drafter is made of; `target_layer_ids` count the target's layers from 0, each tapped after the layer.

    `head_rank` is its sequential head's, where it has one (plugins/models/dflash_head.py).
    """

    vocab_size: int
    hidden_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512
    block_size: int = 8
    rope_theta: float = 500000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    gated: bool = True
    causal: bool = False
    sliding_window: int | None = None
    token_ids: JsonObject = field(default_factory=dict)
    head_rank: int | None = None

    @property
    def gamma(self) -> int:
        return self.block_size - 1

    def config(self) -> ConfigJson:
        """Return the checkpoint's config.json, in the published layout."""
        return (
            describe_laguna(
                asdict(self) | {"max_position_embeddings": MAX_POSITIONS},
                layer_types=[FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers,
                layer_ids=self.target_layer_ids,
                num_target_layers=self.num_target_layers,
                block_size=self.block_size,
                mask_token_id=self.mask_token_id,
                causal=self.causal,
                gated=self.gated,
                head_rank=self.head_rank,
                rope={
                    "rope_type": "default",
                    "rope_theta": self.rope_theta,
                    "partial_rotary_factor": self.partial_rotary_factor,
                },
            )
            | self.token_ids
        )

    def make_mask(self, length: int, gamma: int) -> torch.Tensor:
        """[γ + 1, length + γ + 1] bool: which of the positions a block behind `length` tokens may look at."""
        distance = torch.arange(length, length + gamma + 1)[:, None] - torch.arange(length + gamma + 1)
        mask = torch.ones_like(distance, dtype=torch.bool) if not self.causal else distance >= 0
        return mask if self.sliding_window is None else mask & (distance < self.sliding_window)

    @classmethod
    def from_config(cls, config: ConfigJson) -> DrafterShape:
        rope, dflash = read_rope(config), config["dflash_config"]
        names = [
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "intermediate_size", "rms_norm_eps"),
        ]
        return cls(
            **{name: config[name] for name in names},
            target_layer_ids=tuple(dflash["target_layer_ids"]),
            mask_token_id=dflash["mask_token_id"],
            num_target_layers=dflash.get("num_target_layers"),
            block_size=read_block_size(config),
            rope_theta=rope["rope_theta"],
            partial_rotary_factor=rope.get("partial_rotary_factor", 1.0),
            gated=bool(config.get("gating", True)),
            causal=bool(dflash.get("causal")),
            sliding_window=config["sliding_window"] if SLIDING in read_layer_types(config) else None,
            head_rank=read_rank(dflash),
        )
