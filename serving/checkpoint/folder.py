"""Where a checkpoint's files are, and its config.json.

vLLM finds most mistakes a minute after start-up and under other names. A hub id whose config is not in the local
Hugging Face cache is not checked: vLLM downloads it and decides.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, show
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.machine.cache import find_caches

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAFETENSORS = "vLLM's Laguna reads safetensors: take the release itself (poolside/Laguna-…)"


def find_folder(name: str) -> Path | None:
    """Find the local folder of a path or hub id; None for a hub id that is not in the Hugging Face cache.

    A folder of the cache itself (models--org--name) stands for its main branch's snapshot.

    Raises:
        CheckpointError: a name that is neither an existing folder nor a hub id.
    """
    path = expand(name)
    if _is_readable_folder(path, name):
        return _open_cache_folder(path)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{name}: expected a checkpoint folder or a hub id, got a GGUF file; {SAFETENSORS}")
    if path.exists():
        raise CheckpointError(
            f"{name}: expected a checkpoint folder, got a file; pass the folder that holds config.json"
        )
    if HUB_ID.fullmatch(name) is None or path.parent.is_dir():
        raise CheckpointError(
            f"{name}: expected an existing folder or a hub id (org/name), got neither; check the path"
        )
    return find_cached_snapshot(name)


def _is_readable_folder(path: Path, name: str) -> bool:
    """Say whether there is such a folder. Raises CheckpointError where that cannot be found out, or not be read."""
    try:
        path.stat()
        got = None if not path.is_dir() or os.access(path, os.R_OK | os.X_OK) else os.strerror(errno.EACCES)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        got = error.strerror
    if got is not None:
        raise CheckpointError(f"{show(name)}: expected a folder that can be read, got {got}; check the path")
    return path.is_dir()


def require_folder(name: str, *, config_alone: bool = False) -> Path:
    """Find a folder whose files are read here: a hub id that is not cached is a CheckpointError, too.

    Args:
        name: a folder or a hub id.
        config_alone: nothing but config.json is read of it, so that the remedy asks for no weights.

    Raises:
        CheckpointError: as `find_folder`, or it is not cached.
    """
    folder = find_folder(name)
    if folder is None:
        remedy = f"download it first: hf download {name}{' config.json' if config_alone else ''}"
        raise CheckpointError(f"{name}: expected a folder or a cached hub id, got neither; {remedy}")
    return folder


def name_checkpoint(name: str) -> str:
    """Name a hub id as it is, a folder by its last part: where it lay is nobody's business."""
    path = expand(name)
    return path.resolve().name if os.path.isdir(path) else name


def find_cached_snapshot(hub_id: str) -> Path | None:
    """Find the snapshot of a hub id's main branch in the local Hugging Face cache, or None."""
    home = Path(os.environ.get("HF_HOME") or find_caches() / "huggingface")
    hub = expand(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or str(home / "hub"))
    return _find_snapshot(hub / f"models--{hub_id.replace('/', '--')}")


def _find_snapshot(repository: Path) -> Path | None:
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


def _open_cache_folder(path: Path) -> Path:
    if not path.name.startswith("models--") or (path / "config.json").exists():
        return path
    snapshot = _find_snapshot(path)
    if snapshot is None:
        remedy = "download it again, or pass one of its snapshots"
        raise CheckpointError(f"{path}: expected a cached model with a whole main branch, got none; {remedy}")
    return snapshot


def read_config(folder: Path) -> ConfigJson:
    """Read the checkpoint's config.json as a JSON object.

    Raises CheckpointError when there is none or it is not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {_describe_other_format(folder)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got a file that cannot be read ({error}); fetch it again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}; fetch it again")
    if _is_mlx(config):
        raise CheckpointError(f"{folder}: expected weights for PyTorch, got an MLX conversion; {SAFETENSORS}")
    return config


def _describe_other_format(folder: Path) -> str:
    if path := next(folder.glob("*.gguf"), None):
        return f"expected a checkpoint with config.json, got GGUF ({path.name}); {SAFETENSORS}"
    if (folder / "adapter_config.json").is_file():
        remedy = "pass the base model, and the adapter with -- --enable-lora --lora-modules NAME=FOLDER"
        return f"expected a model, got a LoRA adapter; {remedy}"
    return "expected a checkpoint, got a folder without config.json; check the path"


def _is_mlx(config: ConfigJson) -> bool:
    """mlx-lm writes its groups under `quantization`, with bits and group_size beside them, and no quant_method."""
    groups = config.get("quantization")
    return isinstance(groups, dict) and "group_size" in groups and "bits" in groups


def check_pruning_files(keep_mask: str | None, group_indices: str | None) -> None:
    """Raise CheckpointError unless both files are given and there, or neither; the model checks what is in them."""
    for name, path in (("keep mask", keep_mask), ("group indices", group_indices)):
        if path is None and (keep_mask or group_indices):
            raise CheckpointError(f"{name}: expected a file beside {keep_mask or group_indices}, got none; pass both")
        if path is not None and not os.path.isfile(expand(path)):
            raise CheckpointError(f"{name} {path}: expected a file, got none; check the path")
