"""The model that is served, as its config.json describes it, with transformers' defaults for what it leaves out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.plugins.formats.experts import ExpertFormatError, StoredExperts, read_stored_experts
from laguna_serve.plugins.layers import (
    DEFAULTS,
    DENSE,
    FULL,
    SLIDING,
    SPARSE,
    LayersError,
    find_dropped_rope,
    resolve_layer_kinds,
    stock_layer_kinds,
)
from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, Fields, show
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.checkpoint.quantisation import Quantisation, find_rotation, read_quantisation
from laguna_serve.serving.kit.results import JsonObject

# What transformers looks up in torch.
DTYPE = re.compile(r"b?float\w*|half|double")
STOCK = "LagunaForCausalLM"
PER_HEAD, PER_ELEMENT = "per-head", "per-element"


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is served.

    Attributes:
        dtype: that of the unquantised tensors, in torch's spelling.
        mlp_kinds: "dense" or "sparse" of every layer.
        attention_kinds: "full_attention" or "sliding_attention" of every layer.
        heads: query heads of every layer.
        gate_width: values of the output gate per head: 1, head_dim, or 0 without a gate.
        sliding_window: tokens that a sliding layer sees; None where there is no such layer.
        overrides: what vLLM needs as --hf-overrides because it reads the config otherwise than it is meant.
        pruned: of the experts only some blocks are stored, or loaded.
        experts: what is stored of them; None of whole ones.
        rotated: its hidden states are rotated ones (`find_rotation`).
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    max_model_len: int
    dtype: str
    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int
    mlp_kinds: tuple[str, ...]
    attention_kinds: tuple[str, ...]
    heads: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    gate_width: int
    sliding_window: int | None
    tied: bool
    quantisation: Quantisation | None
    overrides: JsonObject
    pruned: bool = False
    experts: StoredExperts | None = None
    rotated: bool = False

    @property
    def dense(self) -> bool:
        """No layer is a mixture of experts."""
        return SPARSE not in self.mlp_kinds

    @property
    def plain(self) -> bool:
        """Say whether it is in stock layout and unquantised, as transformers and vLLM themselves read it."""
        return self.architecture == STOCK and self.quantisation is None

    @property
    def kv_values_per_layer(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token over all layers, as if every layer kept the whole context."""
        return self.num_layers * self.kv_values_per_layer

    @property
    def full_layers(self) -> int:
        """Layers that keep the whole context."""
        return self.attention_kinds.count(FULL)

    @property
    def sliding_layers(self) -> int:
        """Layers that keep a window of it."""
        return self.attention_kinds.count(SLIDING)


def read_target(folder: Path) -> Target:
    """Read and check a Laguna model's config."""
    config = read_config(folder)
    if is_drafter(config):
        raise CheckpointError(f"{folder}: expected a Laguna model, got a DFlash drafter; pass it as the draft instead")
    architectures = read_architectures(folder, config)
    if config.get("model_type") != "laguna" and not any(name.startswith("Laguna") for name in architectures):
        got = ", ".join([*architectures, f"model_type {show(config.get('model_type'))}"])
        raise CheckpointError(f"{folder}: expected a Laguna model, got {got}; name a Laguna")
    if isinstance(config.get("text_config"), dict):
        remedy = "move its fields up: vLLM's Laguna does not read it and would build its own defaults"
        raise CheckpointError(
            f"{folder}: expected the model's fields at the top of config.json, got text_config; {remedy}"
        )
    fields = Fields(folder, config, defaults=DEFAULTS)
    layers = fields.layers()
    attention = _read_attention(fields, layers)
    overrides: JsonObject = {}
    try:
        kinds = resolve_layer_kinds(config)
    except LayersError as error:
        raise CheckpointError(f"{folder}: {error}; fetch it again") from None
    if kinds != stock_layer_kinds(config):
        overrides["mlp_layer_types"] = kinds
    rope = find_dropped_rope(config)
    if rope is not None:
        overrides["rope_parameters"] = rope
    if config.get("sliding_window") == 0 and SLIDING not in attention:
        # vLLM 0.32 makes None of 0, which LagunaConfig of transformers 5.19 does not take; nothing slides.
        overrides["sliding_window"] = DEFAULTS["sliding_window"]
    return Target(
        name=str(folder),
        architecture=architectures[0] if architectures else STOCK,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=layers,
        max_model_len=fields.positive("max_position_embeddings"),
        dtype=_check_dtype(fields),
        num_experts=fields.integer("num_experts") if SPARSE in kinds else 0,
        experts_per_token=(fields.positive if SPARSE in kinds else fields.integer)("num_experts_per_tok"),
        expert_size=fields.integer("moe_intermediate_size"),
        shared_expert_size=fields.integer("shared_expert_intermediate_size"),
        mlp_kinds=tuple(kinds),
        attention_kinds=attention,
        heads=read_heads(fields, layers),
        num_kv_heads=fields.positive("num_key_value_heads"),
        head_dim=fields.positive("head_dim"),
        gate_width=read_gate_width(fields),
        sliding_window=fields.positive("sliding_window") if SLIDING in attention else None,
        tied=bool(config.get("tie_word_embeddings")),
        quantisation=read_quantisation(folder, config),
        overrides=overrides,
        pruned=bool(config.get("expert_pruning")),
        experts=_read_experts(folder, config),
        rotated=find_rotation(config) is not None,
    )


def _read_experts(folder: Path, config: ConfigJson) -> StoredExperts | None:
    try:
        return read_stored_experts(config, str(folder))
    except ExpertFormatError as error:
        raise CheckpointError(str(error)) from None


def _read_attention(fields: Fields, layers: int) -> tuple[str, ...]:
    return fields.kinds("layer_types", layers, (FULL, SLIDING)) or (FULL,) * layers


def read_heads(fields: Fields, layers: int) -> tuple[int, ...]:
    """Query heads of every layer: their own, or the one number for all."""
    heads = fields.config.get("num_attention_heads_per_layer")
    if heads is None:
        return (fields.positive("num_attention_heads"),) * layers
    if not isinstance(heads, list) or len(heads) != layers or not all(type(n) is int and n > 0 for n in heads):
        raise fields.mismatch("num_attention_heads_per_layer", f"{layers} integers", heads)
    return tuple(heads)


def read_gate_width(fields: Fields) -> int:
    """Values per head of Laguna's output gate. Three spellings exist (`LagunaAttention` in vLLM's laguna.py)."""
    gating = fields.config.get("gating", True)
    if not gating:
        return 0
    if gating not in (True, PER_HEAD, PER_ELEMENT):
        raise fields.mismatch("gating", f"true, false, {PER_HEAD!r} or {PER_ELEMENT!r}", gating)
    return fields.positive("head_dim") if gating == PER_ELEMENT else 1


def read_dtype(config: ConfigJson) -> str:
    """Read the dtype that a config names, in torch's spelling."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _check_dtype(fields: Fields) -> str:
    """Read the dtype; refuse what transformers looks for in torch and does not find ("bf16", "auto", "torch.half")."""
    named = fields.config.get("dtype") or fields.config.get("torch_dtype")
    if named and not (isinstance(named, str) and DTYPE.fullmatch(named)):
        raise fields.mismatch("dtype" if fields.config.get("dtype") else "torch_dtype", "a name as 'bfloat16'", named)
    return read_dtype(fields.config)


def find_served_dtype(stored: str, asked: str = "auto") -> str:
    """Find the numbers that vLLM computes in: those asked for, else those stored, of which it narrows float32.

    Checked against vLLM 0.32.0 (`_resolve_auto_dtype`); on GPUs without bfloat16 they are float16, of the same size.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if stored == "float32" else stored


def value_bytes(dtype: str) -> int:
    """Return the bytes of an unquantised value: of float32 four, of the other dtypes two."""
    return 4 if dtype in ("float32", "float") else 2


def is_drafter(config: ConfigJson) -> bool:
    """Say whether it is a DFlash drafter, in either format."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return (
        "speculators_model_type" in config
        or isinstance(config.get("dflash_config"), dict)
        or any(isinstance(name, str) and name.startswith("DFlash") for name in names)
    )


def read_architectures(folder: Path, config: ConfigJson) -> list[str]:
    """Read the classes that a config names; empty without any."""
    names = config.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise CheckpointError(
            f"{folder}: expected architectures to be a list of classes, got {show(names)}; fetch it again"
        )
    return names


def count_dense_layers(target: Target) -> int:
    """Layers with one feed-forward network instead of experts."""
    return target.mlp_kinds.count(DENSE)
