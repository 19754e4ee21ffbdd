"""A Laguna small enough for brute force: two sparse layers of four experts of eight atoms, routed scale not 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LagunaConfig, LagunaForCausalLM


def make_config(**changes: Any) -> LagunaConfig:
    layers = changes.get("num_hidden_layers", 3)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_attention_heads_per_layer": [2] * layers,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"] * layers,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "moe_routed_scaling_factor": 2.5,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LagunaConfig(**settings | changes)


def make_tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = LagunaForCausalLM(make_config(**changes)).eval()
    with torch.no_grad():  # transformers leaves the router at zero
        for layer in model.model.layers[1:]:
            layer.mlp.gate.weight.normal_()
    return model


def save_tiny(model: Any, folder: Path) -> Path:
    """Write a checkpoint as Laguna is published, in shards."""
    model.save_pretrained(folder, max_shard_size="8KB")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
