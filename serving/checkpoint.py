"""What a checkpoint's config.json says about it, before anything is started.

vLLM finds most mistakes a minute after start-up and under other names.  A hub id whose config is not in the local
Hugging Face cache is not checked: vLLM downloads it and decides.
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
    """The model that is served.

    Attributes:
        dtype: that of the unquantised tensors, in torch's spelling.
        dense: no layer is a mixture of experts.
        pruned: of the experts only some blocks are stored.
        plain: in stock layout and unquantised, as transformers and vLLM themselves read it.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    dtype: str
    kv_values_per_token: int
    dense: bool = False
    pruned: bool = False
    plain: bool = True


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


def require_folder(name: str) -> Path:
    """As `find_folder`, for what reads the files itself: a hub id that is not cached is a CheckpointError, too."""
    folder = find_folder(name)
    if folder is None:
        raise CheckpointError(f"{name}: expected a folder or a cached hub id, got neither; download it first")
    return folder


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
    fields = Fields(folder, config)
    kinds = config.get("mlp_layer_types") or []
    return Target(
        name=str(folder),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        max_model_len=fields.integer("max_position_embeddings"),
        dtype=read_dtype(config),
        kv_values_per_token=fields.kv_values_per_token(),
        dense=bool(kinds) and all(kind == "dense" for kind in kinds),
        pruned=bool(config.get("expert_pruning")),
        plain=architectures == ["LagunaForCausalLM"] and not config.get("quantization_config"),
    )


def read_dtype(config: dict[str, Any]) -> str:
    """The dtype that a config names, in torch's spelling."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def is_drafter(config: dict[str, Any]) -> bool:
    """True for a DFlash drafter in either format."""
    architectures = config.get("architectures") or []
    return "speculators_model_type" in config or any(name.startswith("DFlash") for name in architectures)


def check_pruning_files(keep_mask: str | None, group_indices: str | None) -> None:
    """Raises CheckpointError unless both files are given and there, or neither; the model checks what is in them."""
    for name, path in (("keep mask", keep_mask), ("group indices", group_indices)):
        if path is None and (keep_mask or group_indices):
            raise CheckpointError(f"{name}: expected a file beside {keep_mask or group_indices}, got none; pass both")
        if path is not None and not Path(path).expanduser().is_file():
            raise CheckpointError(f"{name} {path}: expected a file, got none; check the path")


class Fields:
    """Typed access to one object of a config; a missing or mistyped field raises a CheckpointError that names it."""

    def __init__(self, folder: Path, config: object, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder}: expected {prefix.rstrip('.')} in config.json, got none; fetch it again")
        self.config: dict[str, Any] = config

    def integer(self, key: str, default: int | None = None) -> int:
        """A field that is there, or has a default."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mismatch(key, "an integer", value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list."""
        value = self.config.get(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.mismatch(key, "a list of integers", value)
        return tuple(value)

    def kv_values_per_token(self) -> int:
        """Keys and values of one token over all layers, as if every layer kept the whole context."""
        return 2 * self.integer("num_hidden_layers") * self.integer("num_key_value_heads") * self.integer("head_dim")

    def mismatch(self, key: str, expected: str, got: object) -> CheckpointError:
        """The error that names a field."""
        what = "nothing" if got is None else repr(got)
        return CheckpointError(
            f"{self.folder}: expected {self.prefix}{key} to be {expected}, got {what}; fetch it again"
        )
