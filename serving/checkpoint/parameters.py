"""How many parameters a checkpoint has and how many bytes they take, from its config.json alone.

Names and shapes are those of the published checkpoints; what a layer takes follows its config's own rules for which
modules are quantised, and `expert_pruning` for what is stored of its experts. Compared with the releases' own headers
in tests/serving/planning/test_planning.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from laguna_serve.plugins.formats.experts import FP8, SCALE_BLOCK
from laguna_serve.plugins.layers import DENSE
from laguna_serve.serving.checkpoint.drafter import SPECULATORS, Drafter
from laguna_serve.serving.checkpoint.target import Target, find_served_dtype, value_bytes

# Of a scale as releases store it (bf16) and as engines hold it (fp32).
STORED_SCALE, HELD_SCALE = 2, 4
BIAS_BYTES = 4  # selection biases are fp32 whatever the rest is
EXPERTS = ".mlp.experts."


@dataclass(frozen=True, slots=True)
class Module:
    """A linear module's name and shape, or that of a representative, and how many there are of its like."""

    name: str
    rows: int
    columns: int
    copies: int = 1

    @property
    def numel(self) -> int:
        """The weights of all copies."""
        return self.copies * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes: values and scales of the routed experts, and all the rest."""

    values: int
    scales: int
    rest: int

    @property
    def total(self) -> int:
        """All the weights together."""
        return self.values + self.scales + self.rest


def list_modules(target: Target) -> Iterator[Module]:
    """Every linear module; a layer's routed experts in one, of the atoms that are stored."""
    H, sparse = target.hidden_size, 0
    for layer, (heads, kind) in enumerate(zip(target.heads, target.mlp_kinds, strict=True)):
        name, width, kv_width = f"model.layers.{layer}", heads * target.head_dim, target.num_kv_heads * target.head_dim
        yield Module(f"{name}.self_attn.q_proj", width, H)
        yield Module(f"{name}.self_attn.k_proj", kv_width, H)
        yield Module(f"{name}.self_attn.v_proj", kv_width, H)
        yield Module(f"{name}.self_attn.o_proj", H, width)
        yield Module(f"{name}.self_attn.g_proj", heads * target.gate_width, H)
        if kind == DENSE:
            yield from _list_mlp(f"{name}.mlp", target.intermediate_size, H)
            continue
        yield from _list_mlp(f"{name}.mlp.shared_expert", target.shared_expert_size, H)
        if target.experts is None:
            yield from _list_mlp(f"{name}{EXPERTS}0", target.expert_size, H, target.num_experts)
        else:
            atoms = target.experts.kept_blocks[sparse] * target.experts.block_size
            yield from _list_mlp(f"{name}{EXPERTS}0", atoms, H)
        yield Module(f"{name}.mlp.gate", target.num_experts, H)
        sparse += 1


def _list_mlp(name: str, width: int, H: int, copies: int = 1) -> Iterator[Module]:
    yield Module(f"{name}.gate_proj", width, H, copies)
    yield Module(f"{name}.up_proj", width, H, copies)
    yield Module(f"{name}.down_proj", H, width, copies)


def _count_biases(target: Target) -> int:
    return sum(kind != DENSE for kind in target.mlp_kinds) * target.num_experts


def count_other(target: Target) -> int:
    """Norms, selection biases, embedding and head: never quantised."""
    norms = (2 * target.num_layers + 1) * target.hidden_size + 2 * target.num_layers * target.head_dim
    return norms + _count_biases(target) + target.vocab_size * target.hidden_size * (1 if target.tied else 2)


def count_parameters(target: Target) -> int:
    """Every parameter that is stored, the routers' selection biases among them."""
    return sum(module.numel for module in list_modules(target)) + count_other(target)


def count_active(target: Target) -> int:
    """Those that one token is computed with, without the embedding, of which it looks up one row."""
    experts = sum(module.numel for module in list_modules(target) if EXPERTS in module.name)
    used = experts * target.experts_per_token // max(1, target.num_experts)
    embedding = 0 if target.tied else target.vocab_size * target.hidden_size
    return count_parameters(target) - experts + used - embedding


def estimate_bytes(target: Target) -> int:
    """Estimate the bytes of the weights as they are stored."""
    return weigh(target).total


def estimate_held(target: Target, *, dequantised: bool = False, dtype: str = "auto") -> Weights:
    """Estimate the weights as an engine holds them: scales in fp32.

    Args:
        dequantised: linear layers in FP8 become `dtype`, as on a CPU; experts stay as they are.
        dtype: that the engine computes in.
    """
    item = value_bytes(find_served_dtype(target.dtype, dtype))
    return weigh(target, scale_bytes=HELD_SCALE, item=item, dequantised=dequantised)


def weigh(
    target: Target, *, scale_bytes: int = STORED_SCALE, item: int | None = None, dequantised: bool = False
) -> Weights:
    """Bytes of the weights; `item` of a value that is not quantised, by default as in the checkpoint."""
    item = value_bytes(target.dtype) if item is None else item
    values = scales = rest = 0.0
    for module in list_modules(target):
        routed = EXPERTS in module.name
        number, scaled = _weigh_module(target, module, item, scale_bytes, dequantised=dequantised and not routed)
        if routed:
            values, scales = values + number, scales + scaled
        else:
            rest += number + scaled
    rest += item * (count_other(target) - _count_biases(target)) + BIAS_BYTES * _count_biases(target)
    if target.experts is not None:
        rest += 4 * (target.num_experts + 1) * len(target.experts.kept_blocks)  # block_start
    return Weights(int(values), int(scales), int(rest))


def _weigh_module(
    target: Target, module: Module, item: int, scale_bytes: int, *, dequantised: bool
) -> tuple[float, float]:
    """Bytes of a module's values and of its scales."""
    quantisation = target.quantisation
    if target.experts is not None and EXPERTS in module.name:
        if target.experts.format != FP8:
            return item * module.numel, 0
        atoms = module.numel // target.hidden_size
        return module.numel, scale_bytes * atoms * _count_blocks(target.hidden_size)
    if quantisation is None or quantisation.find_group(module.name) is None or dequantised:
        return item * module.numel, 0
    if quantisation.kind != FP8:
        return module.numel * quantisation.weight_bytes(module.name), 0
    blocks = _count_blocks(module.rows) * _count_blocks(module.columns)
    return module.numel, module.copies * blocks * scale_bytes


def _count_blocks(size: int) -> int:
    return -(-size // SCALE_BLOCK)


def count_drafter(drafter: Drafter) -> int:
    """Every parameter of a published drafter; one in the speculators format brings an embedding, which it may lack."""
    from laguna_serve.serving.checkpoint.stored.drafter_weights import (
        expected_tensors,  # NumPy: not where nothing is drafted
    )

    embedding = drafter.target_vocab_size * drafter.hidden_size if drafter.format == SPECULATORS else 0
    return embedding + sum(math.prod(shape) for shape in expected_tensors(drafter).values())


def estimate_drafter_bytes(drafter: Drafter) -> int:
    """Estimate the bytes of a drafter's weights.

    Those of a quantised one as if they were not, as there is none published.
    """
    return value_bytes(drafter.dtype) * count_drafter(drafter)
