"""What scoring will take, from the headers alone: memory, disk, bytes read.

In memory is at most one part of the model in the dtype it is computed in (a decoder layer, the embedding or the head),
beside it one tensor as it is stored and as it is converted, and what one row of text needs on its way through that part
and back. Every tensor is smaller than its part, so that

    peak ≤ 3 × the largest part + the activations of one row + the sums of a layer's experts

besides Python and its libraries. However many layers there are, and however much text, it is the same.
"""

from __future__ import annotations

import math

from laguna_serve.plugins.pruning import ExpertShape
from laguna_serve.scripts.text.rows import TextRows
from laguna_serve.scripts.training.pruning.plan import PARTS, ScoringPlan
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.passes import HEAD_CHUNK, list_steps
from laguna_serve.scripts.training.pruning.streaming.weights import SCALE, Weights


def make_plan(
    layers: Layers, shape: ExpertShape, text: TextRows, score: str, needs_gradients: bool, needs_text: bool
) -> ScoringPlan:
    """Add up what is needed."""
    weights, config = layers.weights, layers.config
    size = layers.dtype.itemsize
    L, H = int(config.num_hidden_layers), shape.hidden_size
    longest = max((len(row) for row in text.rows), default=0)
    row_bytes = measure_row(layers, shape, longest)
    sums_bytes = 8 * shape.num_experts * (6 * shape.intermediate_size + H)
    part_bytes = max(measure_parts(weights, size).values())
    kept = L - shape.layers[0] + 2 if needs_gradients else 2
    steps = list_steps(shape, L, needs_gradients) if needs_text else []
    stored = measure_parts(weights, None)
    read = [stored[f"model.layers.{step.layer}"] for step in steps if step.kind in ("forward", "backward")]
    return ScoringPlan(
        score=score,
        dtype=str(layers.dtype).removeprefix("torch."),
        device=str(layers.device),
        layers=L,
        sparse_layers=len(shape.layers),
        rows=len(text.rows),
        tokens=text.tokens,
        longest=longest,
        model_bytes=sum(weights.num_bytes(name) for name in weights.names()),
        part_bytes=part_bytes,
        row_bytes=row_bytes,
        memory_bytes=PARTS * part_bytes + row_bytes + sums_bytes,
        disk_bytes=kept * text.tokens * H * size + len(shape.layers) * sums_bytes,
        read_bytes=sum(read) if needs_text else sum(stored[f"model.layers.{layer}"] for layer in shape.layers),
    )


def measure_parts(weights: Weights, item_bytes: int | None) -> dict[str, int]:
    """Bytes of every part of a model, with that many bytes a value; None: as it is stored."""
    parts: dict[str, int] = {}
    for name in weights.names():
        part = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        if item_bytes is None:
            parts[part] = parts.get(part, 0) + weights.num_bytes(name)
        elif not name.endswith(SCALE):
            parts[part] = parts.get(part, 0) + item_bytes * math.prod(weights.shape(name))
    return parts


def measure_row(layers: Layers, shape: ExpertShape, tokens: int) -> int:
    """Bound the activations of a row of so many tokens in one part, forward and backward, in fp32."""
    config = layers.config
    H, N, K = shape.hidden_size, shape.intermediate_size, config.num_experts_per_tok
    heads = max(config.num_attention_heads_per_layer or [config.num_attention_heads])
    attention = 12 * heads * config.head_dim + 2 * tokens  # queries, keys and values repeated, their gradients; masks
    experts = K * (8 * N + 4 * H) + 6 * config.shared_expert_intermediate_size + 4 * shape.num_experts
    dense = 6 * config.intermediate_size if len(shape.layers) < config.num_hidden_layers else 0
    head = 5 * min(tokens, HEAD_CHUNK) * config.vocab_size
    return 4 * int(max(tokens * (12 * H + attention + max(experts, dense)), head))
