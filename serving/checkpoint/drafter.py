"""DFlash drafters in the three published formats, as their config.json describes them.

- `DFlashLagunaForCausalLM`: Laguna's own layers; embedding and head are the target's, the whole vocabulary is
  drafted; `dflash_config` holds block_size, and target_layer_ids that count the target's layers from 0. Published
  drafters leave out what transformers' LagunaConfig has defaults for, and say `rope_theta` alone.
- speculators (https://github.com/vllm-project/speculators): Qwen3's layers and a head of its own, mostly over a reduced
  vocabulary whose token i is the target's i + d2t[i]; `aux_hidden_state_layer_ids` count the layers from 1.
- `DFlashDraftModel`, of DFlash's authors (https://github.com/z-lab/dflash): Qwen3's layers, the target's embedding
  and head, the whole vocabulary; `dflash_config.target_layer_ids` count from 0. Served, and neither trained nor
  converted here.

All read the target's hidden states after the layers that are named; vLLM subtracts 1 from the second kind
(transformers_utils/configs/speculators/algos.py of vLLM 0.32).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laguna_serve.plugins.formats.sequential_head import HEAD, HeadError, read_rank
from laguna_serve.plugins.layers import DEFAULTS, FULL, SLIDING
from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, Fields
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.checkpoint.quantisation import Quantisation, read_quantisation
from laguna_serve.serving.checkpoint.target import (
    is_drafter,
    read_architectures,
    read_dtype,
    read_gate_width,
    read_heads,
)

LAGUNA, SPECULATORS, ORIGINAL = "laguna", "speculators", "dflash"
TARGET_ROTATED = "target_rotated"  # what `laguna drafter train` says of it
ARCHITECTURE, ORIGINAL_ARCHITECTURE = "DFlashLagunaForCausalLM", "DFlashDraftModel"
# What transformers' Qwen3Config has for it; DEFAULTS is LagunaConfig's.
QWEN3_MAX_POSITIONS = 32768


@dataclass(frozen=True, slots=True)
class Attention:
    """The sizes of a drafter's layers. `gate` is what a head's output gate has of values per head, 0 without one."""

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
        format: "laguna", "speculators" or "dflash".
        layer_ids: of the target's layers, in the file's own numbering, which begins at `first_layer_id`.
        target_layers: how many layers the target has for which it was trained, where the file says so.
        block_size: the block that it was trained on: the last accepted token and the proposals.
        causal: whether a place of the block sees those behind it, where the file says so.
        verifier: the model that it was trained for, where the file says so.
        head_rank: of its sequential head, where it has one.
        target_rotated: whether it was trained on rotated hidden states (`find_rotation`), where the file says so.
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
    quantisation: Quantisation | None
    attention: Attention
    target_layers: int | None = None
    causal: bool | None = None
    verifier: str | None = None
    head_rank: int | None = None
    target_rotated: bool | None = None

    @property
    def max_gamma(self) -> int:
        """The block's first place holds the last accepted token, the others are proposals."""
        return self.block_size - 1

    @property
    def num_layers(self) -> int:
        """Layers of the drafter itself."""
        return len(self.attention.heads)

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token over all of its layers."""
        return 2 * self.num_layers * self.attention.kv_heads * self.attention.head_dim

    @property
    def mixed(self) -> bool:
        """Sliding and full attention in one drafter."""
        return len(set(self.attention.layer_types)) > 1


def read_drafter(folder: Path) -> Drafter:
    """Read and check a drafter's config in any format. Raises CheckpointError naming what is wrong with it."""
    config = read_config(folder)
    if not is_drafter(config):
        got = ", ".join(read_architectures(folder, config) or ["no architectures"])
        remedy = "pass a DFlash checkpoint as the draft"
        if config.get("model_type") == "laguna":
            remedy = "that is a base model: pass it as the model, and its DFlash drafter as the draft"
        raise CheckpointError(f"{folder}: expected a DFlash drafter, got {got}; {remedy}")
    if "speculators_model_type" in config:
        return _read_speculators(folder, config)
    if read_architectures(folder, config) == [ORIGINAL_ARCHITECTURE]:
        return _read_original(folder, config)
    return _read_laguna(folder, config)


def _read_laguna(folder: Path, config: ConfigJson) -> Drafter:
    architectures = read_architectures(folder, config)
    if architectures != [ARCHITECTURE]:
        expected = f"{ARCHITECTURE}, {ORIGINAL_ARCHITECTURE} or the speculators format"
        raise CheckpointError(f"{folder}: expected {expected}, got {architectures}; pass one of these")
    fields = Fields(folder, config, defaults=DEFAULTS)
    dflash = Fields(folder, config.get("dflash_config"), "dflash_config.")
    layers = fields.layers()
    attention = _read_attention(fields, layers, gate=read_gate_width(fields), bias=bool(config.get("attention_bias")))
    if len(set(attention.layer_types)) > 1:
        raise fields.mismatch("layer_types", "of one kind, as vLLM's Laguna drafter needs", list(attention.layer_types))
    _refuse_anchor(dflash)
    return Drafter(
        name=str(folder),
        format=LAGUNA,
        target_vocab_size=fields.positive("vocab_size"),
        draft_vocab_size=fields.positive("draft_vocab_size", default=fields.positive("vocab_size")),
        target_hidden_size=fields.positive("hidden_size"),
        hidden_size=fields.positive("hidden_size"),
        intermediate_size=fields.positive("intermediate_size"),
        layer_ids=_read_layer_ids(fields, dflash),
        first_layer_id=0,
        mask_token_id=dflash.integer("mask_token_id"),
        block_size=_read_block_size(fields, dflash),
        max_model_len=fields.positive("max_position_embeddings"),
        dtype=read_dtype(config),
        quantisation=read_quantisation(folder, config),
        attention=attention,
        target_layers=dflash.positive("num_target_layers") if "num_target_layers" in dflash.config else None,
        causal=_read_causal(dflash),
        head_rank=_read_head_rank(folder, dflash),
        target_rotated=_read_rotated(config),
    )


def _read_rotated(config: ConfigJson) -> bool | None:
    said = config.get(TARGET_ROTATED)
    return said if isinstance(said, bool) else None


def _read_head_rank(folder: Path, dflash: Fields) -> int | None:
    try:
        return read_rank(dflash.config)
    except HeadError as error:
        raise CheckpointError(f"{folder}: {error}; check config.json") from None


def _read_block_size(fields: Fields, dflash: Fields) -> int:
    """Read it from `dflash_config` where Laguna's are published, from the top where others are."""
    inner, outer = dflash.config.get("block_size"), fields.config.get("block_size")
    if inner is None:
        if outer is None:
            raise dflash.mismatch("block_size", "an integer", None)
        return fields.positive("block_size")
    size = dflash.positive("block_size")
    if outer is not None and outer != inner:
        raise fields.mismatch("block_size", f"the {inner} of dflash_config.block_size", outer)
    return size


def _read_layer_ids(fields: Fields, dflash: Fields) -> tuple[int, ...]:
    """`target_layer_ids`, beside which the same may be said in EAGLE's way, from 1 on: vLLM takes those first."""
    ids = dflash.integers("target_layer_ids")
    if "eagle_aux_hidden_state_layer_ids" in fields.config:
        depths = fields.integers("eagle_aux_hidden_state_layer_ids")
        if depths != tuple(layer + 1 for layer in ids):
            expected = f"dflash_config.target_layer_ids {list(ids)}, each plus 1"
            raise fields.mismatch("eagle_aux_hidden_state_layer_ids", expected, list(depths))
    return ids


def _read_causal(dflash: Fields) -> bool | None:
    causal = dflash.config.get("causal")
    if causal is not None and not isinstance(causal, bool):
        raise dflash.mismatch("causal", "true or false", causal)
    return causal


def _read_speculators(folder: Path, config: ConfigJson) -> Drafter:
    kind = config["speculators_model_type"]
    if kind != "dflash":
        raise CheckpointError(
            f"{folder}: expected a DFlash drafter, got speculators type {kind!r}; pass a DFlash checkpoint"
        )
    fields = Fields(folder, config)
    layers = Fields(folder, config.get("transformer_layer_config"), "transformer_layer_config.")
    _require_qwen3(layers)
    _refuse_anchor(fields)
    for part in (config, config.get("dflash_config")):
        if isinstance(part, dict):
            _refuse_head(folder, part, "the speculators format")
    count = layers.layers()
    speculators = config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
    return Drafter(
        name=str(folder),
        format=SPECULATORS,
        target_vocab_size=layers.positive("vocab_size"),
        draft_vocab_size=fields.positive("draft_vocab_size", default=layers.positive("vocab_size")),
        target_hidden_size=fields.positive("target_hidden_size", layers.positive("hidden_size")),
        hidden_size=layers.positive("hidden_size"),
        intermediate_size=layers.positive("intermediate_size"),
        layer_ids=fields.integers("aux_hidden_state_layer_ids"),
        first_layer_id=1,
        mask_token_id=fields.integer("mask_token_id"),
        block_size=fields.positive("block_size"),
        max_model_len=layers.positive("max_position_embeddings", default=QWEN3_MAX_POSITIONS),
        dtype=read_dtype(config | layers.config),
        quantisation=read_quantisation(folder, config) or read_quantisation(folder, layers.config),
        attention=_read_attention(layers, count, gate=0, bias=bool(layers.config.get("attention_bias"))),
        verifier=Fields(folder, verifier, "speculators_config.verifier.").name("name_or_path") if verifier else None,
        target_rotated=_read_rotated(config),
    )


def _read_original(folder: Path, config: ConfigJson) -> Drafter:
    fields = Fields(folder, config)
    _require_qwen3(fields)
    inner = Fields(folder, config.get("dflash_config", {}), "dflash_config.")
    dflash = Fields(folder, config | inner.config, "dflash_config.")  # what is not there stands at the top
    _refuse_anchor(dflash)
    _refuse_head(folder, dflash.config, ORIGINAL_ARCHITECTURE)
    vocabulary, hidden = fields.positive("vocab_size"), fields.positive("hidden_size")
    return Drafter(
        name=str(folder),
        format=ORIGINAL,
        target_vocab_size=vocabulary,
        draft_vocab_size=fields.positive("draft_vocab_size", default=vocabulary),
        target_hidden_size=fields.positive("target_hidden_size", default=hidden),
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size"),
        layer_ids=_read_layer_ids(fields, dflash),
        first_layer_id=0,
        mask_token_id=dflash.integer("mask_token_id"),
        block_size=_read_block_size(fields, inner),
        max_model_len=fields.positive("max_position_embeddings", default=QWEN3_MAX_POSITIONS),
        dtype=read_dtype(config),
        quantisation=read_quantisation(folder, config),
        attention=_read_attention(fields, fields.layers(), gate=0, bias=bool(config.get("attention_bias"))),
        target_layers=dflash.positive("num_target_layers") if "num_target_layers" in dflash.config else None,
        causal=_read_causal(dflash),
    )


def _refuse_anchor(fields: Fields) -> None:
    if fields.config.get("sample_from_anchor"):
        raise fields.mismatch("sample_from_anchor", "false, as vLLM drafts from masks alone", True)


def _refuse_head(folder: Path, config: ConfigJson, where: str) -> None:
    if config.get(HEAD) is not None:
        remedy = f"only {ARCHITECTURE} has a place for it"
        raise CheckpointError(f"{folder}: expected no {HEAD} in {where}, got one; {remedy}")


def _require_qwen3(fields: Fields) -> None:
    kind = fields.config.get("model_type", "qwen3")
    if kind != "qwen3":
        raise fields.mismatch("model_type", "'qwen3', whose layers vLLM gives a DFlash drafter", kind)


def _read_attention(fields: Fields, layers: int, *, gate: int, bias: bool) -> Attention:
    kinds = fields.kinds("layer_types", layers, (FULL, SLIDING)) or (FULL,) * layers
    window = fields.config.get("sliding_window")
    if SLIDING in kinds and not isinstance(window, int):
        raise fields.mismatch("sliding_window", f"an integer, as layer_types has {SLIDING!r}", window)
    windows = fields.config.get("sliding_windows")
    if windows is not None and (not isinstance(windows, list) or any(each != window for each in windows)):
        raise fields.mismatch("sliding_windows", f"sliding_window's {window} in every layer, as vLLM has one", windows)
    return Attention(
        heads=read_heads(fields, layers),
        kv_heads=fields.positive("num_key_value_heads"),
        head_dim=fields.positive("head_dim"),
        gate=gate,
        bias=bias,
        layer_types=kinds,
    )
