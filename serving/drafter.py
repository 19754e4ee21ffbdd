"""DFlash drafters in both published formats, as their config.json describes them.

- ``DFlashLagunaForCausalLM``: Laguna's own layers; embedding and head are the target's, the whole vocabulary is
  drafted; ``dflash_config.target_layer_ids`` count the target's layers from 0.
- speculators (https://github.com/vllm-project/speculators): Qwen3's layers and a head of its own, mostly over a reduced
  vocabulary whose token i is the target's i + d2t[i]; ``aux_hidden_state_layer_ids`` count the layers from 1.

Both read the target's hidden states after the layers that are named; vLLM subtracts 1 from the second kind
(transformers_utils/configs/speculators/algos.py of vLLM 0.32).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laguna_serve.serving.checkpoint import CheckpointError, Fields, is_drafter, read_config, read_dtype

LAGUNA, SPECULATORS = "laguna", "speculators"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Attention:
    """The sizes of a drafter's layers.  ``gate`` is what a head's output gate has of values per head, 0 without one."""

    heads: tuple[int, ...]
    kv_heads: int
    head_dim: int
    gate: int
    bias: bool
    layer_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drafter:
    """A DFlash drafter.

    Attributes:
        format: "laguna" or "speculators".
        layer_ids: of the target's layers, in the file's own numbering, which begins at ``first_layer_id``.
        block_size: the block that it was trained on: the last accepted token and the proposals.
        verifier: the model that it was trained for, where the file says so.
    """

    name: str
    format: str
    target_vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    hidden_size: int
    intermediate_size: int
    layer_ids: tuple[int, ...]
    first_layer_id: int
    mask_token_id: int
    block_size: int
    max_model_len: int
    dtype: str
    quantised: bool
    attention: Attention
    verifier: str | None = None

    @property
    def max_gamma(self) -> int:
        """The block's first place holds the last accepted token, the others are proposals."""
        return self.block_size - 1

    @property
    def num_layers(self) -> int:
        """Its own."""
        return len(self.attention.heads)

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token over all of its layers."""
        return 2 * self.num_layers * self.attention.kv_heads * self.attention.head_dim


def read_drafter(folder: Path) -> Drafter:
    """Reads and checks a drafter's config in either format.  Raises CheckpointError naming what is wrong with it."""
    config = read_config(folder)
    if not is_drafter(config):
        found = ", ".join(config.get("architectures") or ["no architectures"])
        raise CheckpointError(
            f"{folder}: expected a DFlash drafter, got {found}; pass a DFlash checkpoint as the draft"
        )
    if "speculators_model_type" in config:
        return _read_speculators(folder, config)
    return _read_laguna(folder, config)


def _read_laguna(folder: Path, config: dict[str, Any]) -> Drafter:
    architectures = config.get("architectures")
    if architectures != ["DFlashLagunaForCausalLM"]:
        remedy = "pass one in that format or in speculators'"
        raise CheckpointError(f"{folder}: expected DFlashLagunaForCausalLM, got {architectures}; {remedy}")
    fields = Fields(folder, config)
    dflash = Fields(folder, config.get("dflash_config"), "dflash_config.")
    layers = fields.integer("num_hidden_layers")
    attention = _read_attention(fields, layers, gate=_gate_width(config), bias=bool(config.get("attention_bias")))
    if len(set(attention.layer_types)) > 1:
        raise fields.mismatch("layer_types", "of one kind, as vLLM's Laguna drafter needs", list(attention.layer_types))
    if dflash.config.get("sample_from_anchor"):
        raise dflash.mismatch("sample_from_anchor", "false, as vLLM drafts from masks alone", True)
    return Drafter(
        name=str(folder),
        format=LAGUNA,
        target_vocab_size=fields.integer("vocab_size"),
        draft_vocab_size=fields.integer("draft_vocab_size"),
        target_hidden_size=fields.integer("hidden_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        layer_ids=dflash.integers("target_layer_ids"),
        first_layer_id=0,
        mask_token_id=dflash.integer("mask_token_id"),
        block_size=fields.integer("block_size"),
        max_model_len=fields.integer("max_position_embeddings"),
        dtype=read_dtype(config),
        quantised=bool(config.get("quantization_config")),
        attention=attention,
    )


def _read_speculators(folder: Path, config: dict[str, Any]) -> Drafter:
    kind = config["speculators_model_type"]
    if kind != "dflash":
        raise CheckpointError(
            f"{folder}: expected a DFlash drafter, got speculators type {kind!r}; pass a DFlash checkpoint"
        )
    fields = Fields(folder, config)
    layers = Fields(folder, config.get("transformer_layer_config"), "transformer_layer_config.")
    if layers.config.get("model_type", "qwen3") != "qwen3":
        raise layers.mismatch(
            "model_type", "'qwen3', whose layers vLLM gives a DFlash drafter", layers.config["model_type"]
        )
    if config.get("sample_from_anchor"):
        raise fields.mismatch("sample_from_anchor", "false, as vLLM drafts from masks alone", True)
    count = layers.integer("num_hidden_layers")
    speculators = config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
    return Drafter(
        name=str(folder),
        format=SPECULATORS,
        target_vocab_size=layers.integer("vocab_size"),
        draft_vocab_size=fields.integer("draft_vocab_size"),
        target_hidden_size=fields.integer("target_hidden_size", layers.integer("hidden_size")),
        hidden_size=layers.integer("hidden_size"),
        intermediate_size=layers.integer("intermediate_size"),
        layer_ids=fields.integers("aux_hidden_state_layer_ids"),
        first_layer_id=1,
        mask_token_id=fields.integer("mask_token_id"),
        block_size=fields.integer("block_size"),
        max_model_len=layers.integer("max_position_embeddings", default=32768),
        dtype=read_dtype(config | layers.config),
        quantised=bool(config.get("quantization_config") or layers.config.get("quantization_config")),
        attention=_read_attention(layers, count, gate=0, bias=bool(layers.config.get("attention_bias"))),
        verifier=verifier.get("name_or_path") if isinstance(verifier, dict) else None,
    )


def _read_attention(fields: Fields, layers: int, *, gate: int, bias: bool) -> Attention:
    heads = fields.config.get("num_attention_heads_per_layer")
    if heads is None:
        heads = [fields.integer("num_attention_heads")] * layers
    elif not isinstance(heads, list) or len(heads) != layers:
        raise fields.mismatch("num_attention_heads_per_layer", f"{layers} integers", heads)
    kinds = fields.config.get("layer_types")
    if kinds is None and gate == 0:
        kinds = [FULL] * layers
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise fields.mismatch("layer_types", f"{layers} of {FULL!r} and {SLIDING!r}", kinds)
    window = fields.config.get("sliding_window")
    if SLIDING in kinds and not isinstance(window, int):
        raise fields.mismatch("sliding_window", f"an integer, as layer_types has {SLIDING!r}", window)
    return Attention(
        heads=tuple(heads),
        kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        gate=gate,
        bias=bias,
        layer_types=tuple(kinds),
    )


def _gate_width(config: dict[str, Any]) -> int:
    """Values per head of Laguna's output gate: three spellings exist (``LagunaAttention`` in vLLM's laguna.py)."""
    gating = config.get("gating", True)
    if not gating:
        return 0
    return 1 if gating in (True, "per-head") else int(config.get("head_dim", 0))
