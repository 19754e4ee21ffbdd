"""One piece of transformers' Laguna at a time: a decoder layer, the embedding or the head, read from the shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LagunaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.laguna.modeling_laguna import LagunaDecoderLayer, LagunaRMSNorm, LagunaRotaryEmbedding

from laguna_serve.plugins.layers import FULL, SLIDING
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.serving.checkpoint import CheckpointError, read_config, read_target

# transformers' names of what is published under another one.
PUBLISHED = {
    "mlp.gate.e_score_correction_bias": "mlp.experts.e_score_correction_bias",
    "mlp.shared_experts.": "mlp.shared_expert.",
}
EXPERTS, GATE_UP, DOWN = "mlp.experts.", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last norm and the matrix [V, H] of the logits."""

    norm: Any
    weight: torch.Tensor

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] in fp32 of hidden states [T, H]."""
        logits: torch.Tensor = torch.nn.functional.linear(self.norm(hidden), self.weight)
        return logits.float()


def read_laguna(folder: Path) -> LagunaConfig:
    """Read transformers' config as the checkpoint means it: some spellings transformers drops (plugins/layers.py)."""
    described = {**read_config(folder), **read_target(folder).overrides}
    rope = described.get("rope_parameters")
    if rope and FULL not in rope and SLIDING not in rope:
        described["rope_parameters"] = {FULL: rope, SLIDING: rope}
    return LagunaConfig.from_dict(described)


class Layers:
    """Loads pieces of a model in one dtype on one device; what a caller lets go of is free again."""

    def __init__(self, folder: Path, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        """Read the config, and no weights yet."""
        self.config: Any = read_laguna(folder)
        self.config._attn_implementation = "sdpa"
        # One expert at a time: the others gather copies of the weights.
        self.config._experts_implementation = "eager"
        self.weights, self.dtype, self.device = weights, dtype, device
        self._rotary = LagunaRotaryEmbedding(self.config).to(device)

    def load_embedding(self) -> torch.Tensor:
        """Load the embedding [V, H]."""
        return self._read("model.embed_tokens.weight")

    def load_head(self) -> Head:
        """Load what follows the last layer."""
        norm = LagunaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps).requires_grad_(False)
        norm.weight.data = self._read("model.norm.weight")
        tied = self.config.tie_word_embeddings or "lm_head.weight" not in self.weights
        return Head(norm, self._read("model.embed_tokens.weight" if tied else "lm_head.weight"))

    def load(self, number: int) -> Any:
        """Load a decoder layer.

        Raises:
            CheckpointError: a tensor is missing, or not of the shape that config.json says.
        """
        layer = self._build(number)
        state = {}
        for name, wanted in layer.state_dict().items():
            if name in (GATE_UP, DOWN):
                state[name] = self._read_experts(number, name, wanted.shape)
            else:
                found = self._find(number, name)
                self._check(found, wanted.shape)
                state[name] = self._read(found, keep=name.endswith("e_score_correction_bias"))
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)

    def _build(self, number: int) -> Any:
        """Build a decoder layer without weights, whose state_dict says what is to be read."""
        with torch.device("meta"):
            return LagunaDecoderLayer(self.config, number)

    def surround(self, hidden: torch.Tensor, number: int) -> dict[str, Any]:
        """Make what a layer is called with besides hidden states [B, T, H]: a mask, and the positions' rotation."""
        kind = self.config.layer_types[number]
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        make_mask = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
        mask = make_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        rotation = self._rotary(hidden, positions, kind)
        return {"attention_mask": mask, "position_embeddings": rotation, "position_ids": positions}

    def _find(self, number: int, name: str) -> str:
        """Find what a layer's tensor is called in the files: as published, or as transformers has it."""
        prefix = f"model.layers.{number}."
        for own, published in PUBLISHED.items():
            if name.startswith(own) and prefix + name.replace(own, published) in self.weights:
                return prefix + name.replace(own, published)
        return prefix + name

    def _read_experts(self, number: int, name: str, shape: torch.Size) -> torch.Tensor:
        """Read a fused tensor of all experts from one matrix after the other, or as it is."""
        prefix = f"model.layers.{number}."
        if prefix + name in self.weights:
            self._check(prefix + name, shape)
            return self._read(prefix + name)
        fused = torch.empty(shape, dtype=self.dtype, device=self.device)
        projections = ("gate_proj", "up_proj") if name == GATE_UP else ("down_proj",)
        for expert, matrix in enumerate(fused):
            for slot, projection in zip(matrix.chunk(len(projections)), projections, strict=True):
                stored = f"{prefix}{EXPERTS}{expert}.{projection}.weight"
                self._check(stored, slot.shape)
                slot.copy_(self.weights.read(stored))
        return fused

    def _check(self, name: str, expected: torch.Size) -> None:
        if self.weights.shape(name) != tuple(expected):
            got = f"got {list(self.weights.shape(name))}; fetch the checkpoint again"
            raise CheckpointError(f"{name}: expected {list(expected)}, as config.json says, {got}")

    def _read(self, name: str, keep: bool = False) -> torch.Tensor:
        """Read a tensor; `keep` its dtype."""
        tensor = self.weights.read(name)
        return tensor.to(self.device, None if keep else self.dtype)
