"""How many parameters a checkpoint has and how many bytes they take, from its config.json alone.

Names and shapes are those of the published checkpoints; what a layer takes follows its config's own rules for which
modules are quantised.  Compared with the releases' own headers in tests/serving/planning/test_planning.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from laguna_serve.plugins.layers import DENSE
from laguna_serve.serving.checkpoint.drafter import SPECULATORS, Drafter
from laguna_serve.serving.checkpoint.target import Target

ITEM_BYTES = {"float32": 4, "float": 4}


def list_modules(target: Target) -> Iterator[tuple[str, int]]:
    """List a representative linear module's name, and how many weights there are of its like."""
    H = target.hidden_size
    for layer, (heads, kind) in enumerate(zip(target.heads, target.mlp_kinds, strict=True)):
        name, width = f"model.layers.{layer}", heads * target.head_dim
        yield f"{name}.self_attn.q_proj", H * width
        yield f"{name}.self_attn.k_proj", H * target.num_kv_heads * target.head_dim
        yield f"{name}.self_attn.v_proj", H * target.num_kv_heads * target.head_dim
        yield f"{name}.self_attn.o_proj", H * width
        yield f"{name}.self_attn.g_proj", H * heads * target.gate_width
        if kind == DENSE:
            for part in ("gate_proj", "up_proj", "down_proj"):
                yield f"{name}.mlp.{part}", H * target.intermediate_size
            continue
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"{name}.mlp.shared_expert.{part}", H * target.shared_expert_size
            yield f"{name}.mlp.experts.0.{part}", target.num_experts * H * target.expert_size
        yield f"{name}.mlp.gate", H * target.num_experts


def count_other(target: Target) -> int:
    """Norms, selection biases, embedding and head: never quantised."""
    norms = (2 * target.num_layers + 1) * target.hidden_size + 2 * target.num_layers * target.head_dim
    biases = sum(kind != DENSE for kind in target.mlp_kinds) * target.num_experts
    return norms + biases + target.vocab_size * target.hidden_size * (1 if target.tied else 2)


def count_parameters(target: Target) -> int:
    """Every parameter, the routers' selection biases among them."""
    return sum(count for _, count in list_modules(target)) + count_other(target)


def count_active(target: Target) -> int:
    """Those that one token is computed with, without the embedding, of which it looks up one row."""
    experts = sum(count for name, count in list_modules(target) if ".mlp.experts." in name)
    used = experts * target.experts_per_token // max(1, target.num_experts)
    embedding = 0 if target.tied else target.vocab_size * target.hidden_size
    return count_parameters(target) - experts + used - embedding


def estimate_bytes(target: Target) -> int:
    """Estimate the bytes of the weights as they are stored."""
    item = ITEM_BYTES.get(target.dtype, 2)
    quantisation = target.quantisation
    if quantisation is None:
        return item * count_parameters(target)
    return int(
        sum(count * quantisation.weight_bytes(name) for name, count in list_modules(target))
    ) + item * count_other(target)


def count_drafter(drafter: Drafter) -> int:
    """Every parameter of a published drafter; one in the speculators format brings an embedding, which it may lack."""
    from laguna_serve.serving.checkpoint.drafter_weights import expected_tensors  # NumPy: not where nothing is drafted

    embedding = drafter.target_vocab_size * drafter.hidden_size if drafter.format == SPECULATORS else 0
    return embedding + sum(math.prod(shape) for shape in expected_tensors(drafter).values())


def estimate_drafter_bytes(drafter: Drafter) -> int:
    """Estimate the bytes of a drafter's weights.

    Those of a quantised one as if they were not, as there is none published.
    """
    return ITEM_BYTES.get(drafter.dtype, 2) * count_drafter(drafter)
