"""How many parameters and bytes a Laguna has, and what pruning takes away: of the files, or of the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from laguna_serve.plugins.formats.experts import StoredExperts
from laguna_serve.plugins.layers import list_heads
from laguna_serve.plugins.pruning import ExpertShape, Pruning, PruningError
from laguna_serve.scripts.checkpoints.compaction.base import Base
from laguna_serve.scripts.checkpoints.compaction.shards import Compaction, block_shapes
from laguna_serve.scripts.checkpoints.headers import ITEM_BYTES, count_stored
from laguna_serve.serving.checkpoint import ConfigJson, Target
from laguna_serve.serving.checkpoint.parameters import Weights, estimate_held, weigh

PROJECTIONS = 3  # gate row, up row and down column: what an atom has of each


@dataclass(frozen=True, slots=True)
class Savings:
    """What goes and what stays.

    Attributes:
        bytes_before, bytes_after: of all tensors.
        expert_bytes, scale_bytes: of the output's routed experts: values, and their scales in FP8.
        held_bytes: the output's weights in a GPU's memory, where scales are fp32.
        kept_range: the fewest and the most blocks kept of any sparse layer.
    """

    format: str
    parameters_before: int
    parameters_after: int
    blocks: int
    blocks_pruned: int
    bytes_before: int
    bytes_after: int
    bytes_saved: int
    expert_bytes: int
    scale_bytes: int
    held_bytes: int
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
        attention = sum(_count_attention(config, H, heads) for heads in list_heads(config))
        dense_layers = config["num_hidden_layers"] - len(shape.layers)
        dense = dense_layers * PROJECTIONS * config["intermediate_size"] * H
        norms = (2 * config["num_hidden_layers"] + 1) * H
        routed = PROJECTIONS * shape.num_experts * shape.intermediate_size * H
        shared = PROJECTIONS * config["shared_expert_intermediate_size"] * H
        router = shape.num_experts * (H + 1)
    except (KeyError, TypeError) as error:
        raise PruningError(f"config.json: expected every size of a Laguna, got {error!r}; fetch it again") from None
    return int(embedding + attention + dense + norms + len(shape.layers) * (routed + shared + router))


def _count_attention(config: ConfigJson, H: int, heads: int) -> int:
    D: int = config["head_dim"]
    kv: int = config["num_key_value_heads"]
    widths = (heads + 2 * kv) * D
    gate = 0
    if config.get("gating", True):
        gate = heads if config.get("gating", True) in (True, "per-head") else heads * D
    biases = widths + H if config.get("attention_bias") else 0
    return H * (widths + gate + heads * D) + 2 * D + biases


def cut_target(target: Target, pruning: Pruning, stored: str) -> Target:
    """Return the model as it is without the pruned blocks, the others being stored in that format."""
    kept = StoredExperts(stored, pruning.block_size, pruning.blocks_per_expert, tuple(pruning.kept_blocks))
    return replace(target, pruned=True, experts=kept)


def estimate_savings(
    target: Target, pruning: Pruning, stored: str, parameters: int, shape: ExpertShape, *, zeroed: bool
) -> Savings:
    """Estimate what would be saved, by the config alone; a zeroed form saves nothing."""
    made = target if zeroed else cut_target(target, pruning, stored)
    return _compute(target, made, pruning, stored, parameters, shape, weigh(target), weigh(made))


def measure_savings(job: Compaction, target: Target) -> Savings:
    """Measure what is saved, by the headers of the base's files."""
    base = job.base
    names = [name for layer in base.shape.layers for name in base.expert_names(layer)]
    scales = {name for name in names if name.endswith("_scale")}
    routed = _sum(base, names) - _sum(base, scales)
    rest = _sum(base, base.tensors) - _sum(base, names)
    before = Weights(routed, _sum(base, scales), rest)
    sizes = {
        name: math.prod(shape) * ITEM_BYTES[dtype]
        for layer in range(len(base.shape.layers))
        for name, (dtype, shape) in block_shapes(job, layer).items()
    }
    made = {end: sum(size for name, size in sizes.items() if name.endswith(end)) for end in ("blocks", "scales")}
    starts = sum(sizes.values()) - sum(made.values())
    after = Weights(made["blocks"], made["scales"], rest + starts)
    made_of = target if job.zeroed else cut_target(target, job.pruning, job.format)
    sizes_after = before if job.zeroed else after
    stored = count_stored(base.tensors)
    return _compute(target, made_of, job.pruning, job.format, stored, base.shape, before, sizes_after)


def _sum(base: Base, names: Iterable[str]) -> int:
    return sum(base.tensors[name].num_bytes for name in names)


def _compute(
    target: Target,
    made: Target,
    pruning: Pruning,
    stored: str,
    parameters: int,
    shape: ExpertShape,
    before: Weights,
    after: Weights,
) -> Savings:
    gone = 0 if made is target else pruning.pruned_blocks * pruning.block_size * PROJECTIONS * shape.hidden_size
    kept = pruning.kept_blocks
    return Savings(
        format=stored,
        parameters_before=parameters,
        parameters_after=parameters - gone,
        blocks=int(pruning.keep.size),
        blocks_pruned=pruning.pruned_blocks,
        bytes_before=before.total,
        bytes_after=after.total,
        bytes_saved=before.values + before.scales - after.values - after.scales,
        expert_bytes=after.values,
        scale_bytes=after.scales,
        held_bytes=estimate_held(made).total,
        kept_range=(min(kept), max(kept)),
        blocks_per_layer=int(pruning.keep[0].size),
    )
