"""The config.json of a drafter in Laguna's format, as Poolside publishes them, and what older layouts say elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laguna_serve.plugins.formats.sequential_head import describe_rank
from laguna_serve.plugins.layers import DEFAULT_ROPE, FULL, SLIDING, find_dropped_rope
from laguna_serve.serving.checkpoint import ConfigJson
from laguna_serve.serving.kit.results import JsonObject

PROPOSAL = "greedy"
SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
)


def describe_laguna(
    sizes: Mapping[str, Any],
    *,
    layer_types: Sequence[str],
    layer_ids: Sequence[int],
    num_target_layers: int | None,
    block_size: int,
    mask_token_id: int,
    causal: bool,
    gated: bool,
    rope: Mapping[str, Any],
    head_rank: int | None = None,
    dtype: str = "bfloat16",
) -> ConfigJson:
    """Describe a config.json in the published layout.

    `rope` is said in full and not as `rope_theta` alone, which transformers drops (plugins/layers.py).

    Args:
        sizes: SHARED_KEYS, and sliding_window where a layer slides.
        layer_ids: the target's layers that are tapped, counted from 0.
        num_target_layers: how many layers the target has; None where that is not known.
        rope: rotary parameters of every layer.
        head_rank: of the sequential head, where there is one.
    """
    dflash: JsonObject = {"block_size": block_size, "mask_token_id": mask_token_id, **describe_rank(head_rank)}
    if num_target_layers is not None:
        dflash["num_target_layers"] = num_target_layers
    window = {"sliding_window": sizes["sliding_window"]} if sizes.get("sliding_window") else {}
    return {
        "architectures": ["DFlashLagunaForCausalLM"],
        "model_type": "laguna",
        "torch_dtype": dtype,
        "attention_bias": False,
        "hidden_act": "silu",
        **{key: sizes[key] for key in SHARED_KEYS if sizes.get(key) is not None},
        **window,
        "layer_types": list(layer_types),
        "gating": "per-head" if gated else False,
        "draft_vocab_size": sizes["vocab_size"],
        "num_experts": 0,
        "rope_parameters": {FULL: dict(rope), SLIDING: dict(rope)},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layer_ids],
        "dflash_config": {**dflash, "target_layer_ids": list(layer_ids), "causal": causal},
    }


def describe_speculators(
    layers: Mapping[str, Any],
    *,
    verifier: str,
    draft_vocab_size: int,
    target_hidden_size: int,
    layer_ids: Sequence[int],
    block_size: int,
    mask_token_id: int,
    causal: bool,
    dtype: str = "bfloat16",
) -> ConfigJson:
    """Describe a config.json in the speculators format.

    Args:
        layers: sizes, layer_types and rope_parameters of its layers, which are Qwen3's.
        verifier: name of the target.
        layer_ids: the target's layers that are tapped, counted from 0.
    """
    proposal = {"proposal_type": PROPOSAL, "speculative_tokens": block_size - 1}
    return {
        "architectures": ["DFlashSpeculator"],
        "dtype": dtype,
        "speculators_model_type": "dflash",
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": PROPOSAL,
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": ["LagunaForCausalLM"]},
        },
        "transformer_layer_config": {**layers, "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False},
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": target_hidden_size,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in layer_ids],
        "sliding_window_non_causal": not causal,
    }


def read_block_size(config: ConfigJson) -> int:
    """Read it from `dflash_config`, or from the top, where other drafters have it."""
    inner = config["dflash_config"].get("block_size")
    return int(config["block_size"] if inner is None else inner)


def read_layer_types(config: ConfigJson) -> list[str]:
    """ "full_attention" or "sliding_attention" of every layer."""
    return list(config.get("layer_types") or [FULL] * config["num_hidden_layers"])


def read_rope(config: ConfigJson) -> JsonObject:
    """Read the rotary parameters of the layers, all of one kind, whichever way the config says them."""
    stated = find_dropped_rope(config)
    if stated is not None:
        return dict(stated)
    kind = read_layer_types(config)[0]
    rope: ConfigJson = config.get("rope_parameters") or DEFAULT_ROPE
    return dict(rope.get(kind, rope))
