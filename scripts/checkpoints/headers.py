"""A checkpoint's safetensors files: which tensors they hold, checked against the index, and the files mapped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from laguna_serve.plugins.formats.fp8 import count_blocks
from laguna_serve.serving.checkpoint import CheckpointError

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "I64": 8, "I32": 4, "BOOL": 1}
FP8_DTYPE = "F8_E4M3"
# What belongs to a weight or to the KV cache, and is no parameter.
SCALE_SUFFIXES = (".weight_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its file's header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


def count_stored(tensors: Mapping[str, Entry]) -> int:
    """Parameters of a checkpoint, without the scales that belong to them."""
    return sum(entry.numel for name, entry in tensors.items() if not name.endswith(SCALE_SUFFIXES))


def read_headers(folder: Path, name: str) -> tuple[dict[str, Entry], str]:
    """Every tensor of a checkpoint, and a fingerprint of its config and files.

    Raises:
        CheckpointError: a file is missing or cut off, or the index does not fit the files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    tensors: dict[str, Entry] = {}
    for file in _list_files(folder, name):
        tensors |= _read_header(folder, file)
        digest.update(_identify(folder / file))
    if (folder / INDEX).is_file():
        _check_index(folder, tensors)
    return tensors, digest.hexdigest()


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Open the file, mapped; its tensors are views of the mapping for as long as they live."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got one that cannot be read ({error}); fetch it again"
        ) from None


@contextmanager
def open_files(folder: Path, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Several files of a folder, mapped."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(open_file(folder / name)) for name in sorted(set(names))}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a drafter, in one file or several."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_file(path) as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def require_block_scales(tensors: Mapping[str, Entry], name: str) -> None:
    """Check that every matrix in FP8 has scales beside it, one for each 128×128 block. Raises CheckpointError."""
    for key, entry in tensors.items():
        if entry.dtype != FP8_DTYPE:
            continue
        scale = tensors.get(f"{key}_scale")
        expected = f"{key}_scale of {[*map(count_blocks, entry.shape)]}, one for each 128×128 block of {[*entry.shape]}"
        if scale is None or scale.shape != tuple(map(count_blocks, entry.shape)):
            got = "none" if scale is None else str([*scale.shape])
            raise CheckpointError(f"{name}: expected {expected}, got {got}; fetch it again, with its config.json")


def is_identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes: NaN equals NaN, and −0 does not equal 0."""
    views = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*views)


def _list_files(folder: Path, name: str) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        got = f"neither, but {others[0]}" if others else "neither"
        remedy = f"fetch {INDEX}, or the release in safetensors" if others else "fetch the weights"
        raise CheckpointError(f"{name}: expected model.safetensors or {INDEX}, got {got}; {remedy}")
    return sorted(set(_read_weight_map(index).values()))


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = [Path(file).name == file for file in weight_map.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: expected an index with weight_map, got {error!r}; fetch it again") from None
    if not names or not all(names):
        raise CheckpointError(f"{index}: expected weight_map to name files beside it, got other paths; fetch it again")
    return dict(weight_map)


def _read_header(folder: Path, file: str) -> dict[str, Entry]:
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file that the index names, got none; fetch it again")
    with open_file(path) as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  safe_open is no mapping
        entries = {key: Entry(file, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    for key, entry in entries.items():
        if entry.dtype not in ITEM_BYTES:
            expected = f"tensors in {', '.join(ITEM_BYTES)}"
            raise CheckpointError(
                f"{path}: expected {expected}, got {key} in {entry.dtype}; take the bf16 or FP8 release"
            )
    return entries


def _identify(path: Path) -> bytes:
    """Identify a version of a file without reading its gigabytes: by size, time and header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    stat = path.stat()
    return hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + header).digest()


def _check_index(folder: Path, tensors: dict[str, Entry]) -> None:
    listed = _read_weight_map(folder / INDEX)
    stored = {name: entry.file for name, entry in tensors.items()}
    if listed != stored:
        stray = min(listed.items() ^ stored.items())[0]
        expected = f"each tensor in the file that the index names ({listed.get(stray, 'none')})"
        raise CheckpointError(
            f"{folder}: expected {expected}, got {stray} in {stored.get(stray, 'none')}; fetch both again"
        )
