"""Models that are not Laguna and are served all the same: dense ones in Llama's shape that vLLM has.

They are described by the same `Target`, so that memory, context and devices are planned as for Laguna.  What is
Laguna's alone is refused for them: drafters, pruned experts, new weights while serving, quantised weights.
"""

from __future__ import annotations

from pathlib import Path

from laguna_serve.plugins.layers import DENSE, FULL, SLIDING
from laguna_serve.serving.checkpoint.fields import CheckpointError, Fields
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.checkpoint.target import Target, is_drafter, read_architectures, read_dtype, read_target

# Architecture → which of vLLM's classes serves it (model_executor/models/registry.py of vLLM 0.32).
OTHERS = {"SmolLM3ForCausalLM": "vLLM's Transformers backend"}


def read_served(folder: Path) -> Target:
    """Read and check the config of a model that is to be served: a Laguna, or one of `OTHERS`.

    Raises:
        CheckpointError: it is neither, or its config is not what it should be.
    """
    config = read_config(folder)
    names = [] if is_drafter(config) else read_architectures(folder, config)
    if not names or names[0] not in OTHERS:
        return read_target(folder)
    fields = Fields(folder, config)
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: expected {names[0]} without quantization_config, got one; serve it in bf16")
    layers, heads = fields.layers(), fields.positive("num_attention_heads")
    hidden = fields.positive("hidden_size")
    attention = fields.kinds("layer_types", layers, (FULL, SLIDING)) or (FULL,) * layers
    return Target(
        name=str(folder),
        architecture=names[0],
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=layers,
        max_model_len=fields.positive("max_position_embeddings"),
        dtype=read_dtype(config),
        num_experts=0,
        experts_per_token=0,
        expert_size=0,
        shared_expert_size=0,
        mlp_kinds=(DENSE,) * layers,
        attention_kinds=attention,
        heads=(heads,) * layers,
        num_kv_heads=fields.positive("num_key_value_heads", heads),
        head_dim=fields.positive("head_dim", hidden // heads),
        gate_width=0,
        sliding_window=fields.positive("sliding_window") if SLIDING in attention else None,
        tied=bool(config.get("tie_word_embeddings", True)),
        quantisation=None,
        overrides={},
    )


def check_other(target: Target, *, draft: bool, pruned: bool, weight_updates: bool) -> list[str]:
    """Return what is to be said of a model that is no Laguna, a line each; nothing of a Laguna.

    Raises:
        CheckpointError: something that only Laguna has is asked of it.
    """
    if target.architecture not in OTHERS:
        return []
    asked = {"a drafter": draft, "a keep mask": pruned, "weight updates": weight_updates}
    for what, wanted in asked.items():
        if wanted:
            raise CheckpointError(f"{target.name}: expected a Laguna for {what}, got {target.architecture}; drop it")
    served = OTHERS[target.architecture]
    return [
        f"{target.architecture} is no Laguna: {served} serves it; memory and context are planned from config.json,"
        " answers are compared with transformers' on the toy student alone (docs/dante.md)"
    ]
