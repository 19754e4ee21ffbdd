"""What a checkpoint's config.json says about it, and whether a drafter fits its target, before anything is started.

vLLM finds most of these mismatches a minute after start-up and under other names, and one (γ beyond the trained block)
never.  A hub id whose config is not in the local Hugging Face cache is not checked: vLLM downloads it and decides.

Two drafter formats are read: ``DFlashLagunaForCausalLM``, whose layer ids count from 0, and speculators, whose layer
ids count from 1 (vLLM subtracts).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served, as one line."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is served.  ``dtype`` is that of the unquantised tensors, in torch's spelling."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    dtype: str
    kv_values_per_token: int


@dataclass(frozen=True, slots=True)
class Drafter:
    """A DFlash drafter.  ``layer_ids`` are the file's own, which number the target's layers from ``first_layer_id``."""

    name: str
    target_vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    layer_ids: tuple[int, ...]
    first_layer_id: int
    mask_token_id: int
    block_size: int
    kv_values_per_token: int

    @property
    def max_gamma(self) -> int:
        """The block's first place holds the last accepted token, the others are proposals."""
        return self.block_size - 1


def find_folder(name: str) -> Path | None:
    """The local folder of a path or hub id; None for a hub id that is not in the Hugging Face cache.

    Raises:
        CheckpointError: a name that is neither an existing folder nor a hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name}: expected a checkpoint folder, got a file; pass the folder that holds config.json"
        )
    if HUB_ID.fullmatch(name) is None or path.parent.is_dir():
        raise CheckpointError(
            f"{name}: expected an existing folder or a hub id (org/name), got neither; check the path"
        )
    return find_cached_snapshot(name)


def find_cached_snapshot(hub_id: str) -> Path | None:
    """The snapshot of a hub id's main branch in the local Hugging Face cache, or None."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json as a JSON object.  Raises CheckpointError when there is none or it is not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: expected a checkpoint, got a folder without config.json; check the path"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got a file that cannot be read ({error}); fetch it again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}; fetch it again")
    return config


def read_target(folder: Path) -> Target:
    """Reads and checks a Laguna model's config."""
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if is_drafter(config):
        raise CheckpointError(f"{folder}: expected a Laguna model, got a DFlash drafter; pass it as the draft instead")
    if config.get("model_type") != "laguna" and not any(name.startswith("Laguna") for name in architectures):
        found = ", ".join([*architectures, f"model_type {config.get('model_type')!r}"])
        raise CheckpointError(f"{folder}: expected a Laguna model, got {found}; start other models with vLLM itself")
    fields = _Fields(folder, config)
    return Target(
        name=str(folder),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        max_model_len=fields.integer("max_position_embeddings"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        kv_values_per_token=fields.kv_values_per_token(),
    )


def is_drafter(config: dict[str, Any]) -> bool:
    """True for a DFlash drafter in either format."""
    architectures = config.get("architectures") or []
    return "speculators_model_type" in config or any(name.startswith("DFlash") for name in architectures)


def read_drafter(folder: Path) -> Drafter:
    """Reads and checks a DFlash drafter's config in either format."""
    config = read_config(folder)
    if not is_drafter(config):
        found = ", ".join(config.get("architectures") or ["no architectures"])
        raise CheckpointError(
            f"{folder}: expected a DFlash drafter, got {found}; pass a DFlash checkpoint as the draft"
        )
    if "speculators_model_type" in config:
        return _read_speculators(folder, config)
    fields = _Fields(folder, config)
    dflash = _Fields(folder, config.get("dflash_config"), "dflash_config.")
    vocab_size = fields.integer("vocab_size")
    return Drafter(
        name=str(folder),
        target_vocab_size=vocab_size,
        draft_vocab_size=fields.integer("draft_vocab_size"),
        target_hidden_size=fields.integer("hidden_size"),
        layer_ids=dflash.integers("target_layer_ids"),
        first_layer_id=0,
        mask_token_id=dflash.integer("mask_token_id"),
        block_size=fields.integer("block_size"),
        kv_values_per_token=fields.kv_values_per_token(),
    )


def _read_speculators(folder: Path, config: dict[str, Any]) -> Drafter:
    kind = config["speculators_model_type"]
    if kind != "dflash":
        raise CheckpointError(
            f"{folder}: expected a DFlash drafter, got speculators type {kind!r}; pass a DFlash checkpoint"
        )
    fields = _Fields(folder, config)
    layers = _Fields(folder, config.get("transformer_layer_config"), "transformer_layer_config.")
    own_target_hidden_size = config.get("target_hidden_size") is not None
    return Drafter(
        name=str(folder),
        target_vocab_size=layers.integer("vocab_size"),
        draft_vocab_size=fields.integer("draft_vocab_size"),
        target_hidden_size=fields.integer("target_hidden_size")
        if own_target_hidden_size
        else layers.integer("hidden_size"),
        layer_ids=fields.integers("aux_hidden_state_layer_ids"),
        first_layer_id=1,
        mask_token_id=fields.integer("mask_token_id"),
        block_size=fields.integer("block_size"),
        kv_values_per_token=layers.kv_values_per_token(),
    )


def check_fit(target: Target, drafter: Drafter) -> None:
    """Raises CheckpointError naming the first thing in which the drafter does not fit its target."""
    subject = f"drafter {drafter.name}"
    remedy = f"take a drafter trained for {target.name}"
    for what, expected, got in (
        ("vocabulary", target.vocab_size, drafter.target_vocab_size),
        ("hidden size", target.hidden_size, drafter.target_hidden_size),
    ):
        if expected != got:
            raise CheckpointError(f"{subject}: expected the target's {what} {expected}, got {got}; {remedy}")
    if drafter.draft_vocab_size > target.vocab_size:
        limit = f"at most {target.vocab_size} draft tokens"
        raise CheckpointError(f"{subject}: expected {limit}, got {drafter.draft_vocab_size}; {remedy}")
    last_layer_id = target.num_layers + drafter.first_layer_id - 1
    strays = [layer for layer in drafter.layer_ids if not drafter.first_layer_id <= layer <= last_layer_id]
    if strays or not drafter.layer_ids:
        limits = f"target layer ids from {drafter.first_layer_id} to {last_layer_id}"
        raise CheckpointError(f"{subject}: expected {limits}, got {strays or 'none'}; {remedy}")
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        limits = f"a mask token from 0 to {target.vocab_size - 1}"
        raise CheckpointError(f"{subject}: expected {limits}, got {drafter.mask_token_id}; {remedy}")


def check_pruning_files(keep_mask: str | None, group_indices: str | None) -> None:
    """Raises CheckpointError unless both files are given and there, or neither; the model checks what is in them."""
    for name, path in (("keep mask", keep_mask), ("group indices", group_indices)):
        if path is None and (keep_mask or group_indices):
            raise CheckpointError(f"{name}: expected a file beside {keep_mask or group_indices}, got none; pass both")
        if path is not None and not Path(path).expanduser().is_file():
            raise CheckpointError(f"{name} {path}: expected a file, got none; check the path")


def resolve_gamma(gamma: int | None, drafter: Drafter | None) -> int:
    """The number of proposals per step: the given γ if the drafter was trained for it, by default its maximum.

    Beyond block − 1 the drafter sees positions it was never trained on; vLLM would run it without a word.  For a
    drafter that is not on this machine (None) γ cannot be checked and must be given.
    """
    if gamma is not None and gamma < 1:
        raise CheckpointError(
            f"gamma: expected at least 1, got {gamma}; leave the draft out to serve without speculation"
        )
    if drafter is None:
        if gamma is None:
            raise CheckpointError(
                "gamma: expected a number for a drafter that is not on this machine, got none; pass it"
            )
        return gamma
    if drafter.max_gamma < 1:
        raise CheckpointError(
            f"drafter {drafter.name}: expected a block of at least 2, got {drafter.block_size}; check it"
        )
    if gamma is not None and gamma > drafter.max_gamma:
        block = f"block {drafter.block_size} of {drafter.name}"
        raise CheckpointError(f"gamma: expected 1 to {drafter.max_gamma} ({block}), got {gamma}; lower it")
    return gamma or drafter.max_gamma


def weight_bytes(folder: Path) -> int:
    """Size of the checkpoint's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class _Fields:
    """Typed access to one object of a config; a missing or mistyped field raises a CheckpointError that names it."""

    def __init__(self, folder: Path, config: object, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder}: expected {prefix.rstrip('.')} in config.json, got none; fetch it again")
        self.config: dict[str, Any] = config

    def integer(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mismatch(key, "an integer", value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._mismatch(key, "a list of integers", value)
        return tuple(value)

    def kv_values_per_token(self) -> int:
        """Keys and values of one token over all layers, as if every layer kept the whole context."""
        return 2 * self.integer("num_hidden_layers") * self.integer("num_key_value_heads") * self.integer("head_dim")

    def _mismatch(self, key: str, expected: str, got: object) -> CheckpointError:
        what = "nothing" if got is None else repr(got)
        return CheckpointError(
            f"{self.folder}: expected {self.prefix}{key} to be {expected}, got {what}; fetch it again"
        )
