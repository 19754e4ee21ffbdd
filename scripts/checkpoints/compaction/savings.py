"""How many parameters a Laguna has, from its config alone, and what pruning takes away."""

from __future__ import annotations

from dataclasses import dataclass

from laguna_serve.plugins.pruning import ExpertShape, Pruning, PruningError
from laguna_serve.serving.checkpoint import ConfigJson

PROJECTIONS = 3  # gate row, up row and down column: what an atom has of each
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Savings:
    """What goes and what stays.  `kept_range` is the fewest and the most blocks kept of any sparse layer."""

    parameters_before: int
    parameters_after: int
    blocks: int
    blocks_pruned: int
    bytes_saved: int
    kept_range: tuple[int, int]
    blocks_per_layer: int


def count_parameters(config: ConfigJson, shape: ExpertShape) -> int:
    """Every stored parameter, the routers' selection biases among them.

    Raises:
        PruningError: a field that the sum needs is not in the config.
    """
    try:
        H, V = shape.hidden_size, config["vocab_size"]
        embedding = V * H * (1 if config.get("tie_word_embeddings") else 2)
        attention = sum(_count_attention(config, H, heads) for heads in _heads(config))
        dense_layers = config["num_hidden_layers"] - len(shape.layers)
        dense = dense_layers * PROJECTIONS * config["intermediate_size"] * H
        norms = (2 * config["num_hidden_layers"] + 1) * H
        routed = PROJECTIONS * shape.num_experts * shape.intermediate_size * H
        shared = PROJECTIONS * config["shared_expert_intermediate_size"] * H
        router = shape.num_experts * (H + 1)
    except (KeyError, TypeError) as error:
        raise PruningError(f"config.json: expected every size of a Laguna, got {error!r}; fetch it again") from None
    return int(embedding + attention + dense + norms + len(shape.layers) * (routed + shared + router))


def _heads(config: ConfigJson) -> list[int]:
    layers: int = config["num_hidden_layers"]
    heads: list[int] = config.get("num_attention_heads_per_layer") or [config["num_attention_heads"]] * layers
    return heads


def _count_attention(config: ConfigJson, H: int, heads: int) -> int:
    D: int = config["head_dim"]
    kv: int = config["num_key_value_heads"]
    widths = (heads + 2 * kv) * D
    gate = 0
    if config.get("gating", True):
        gate = heads if config.get("gating", True) in (True, "per-head") else heads * D
    biases = widths + H if config.get("attention_bias") else 0
    return H * (widths + gate + heads * D) + 2 * D + biases


def compute_savings(parameters: int, shape: ExpertShape, pruning: Pruning, item_bytes: int) -> Savings:
    """Compute what the pruning saves of a model with that many parameters."""
    gone = pruning.pruned_blocks * pruning.block_size * PROJECTIONS * shape.hidden_size
    kept = pruning.kept_blocks
    return Savings(
        parameters_before=parameters,
        parameters_after=parameters - gone,
        blocks=int(pruning.keep.size),
        blocks_pruned=pruning.pruned_blocks,
        bytes_saved=gone * item_bytes,
        kept_range=(min(kept), max(kept)),
        blocks_per_layer=int(pruning.keep[0].size),
    )
