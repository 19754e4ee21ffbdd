"""Are a checkpoint's safetensors files all there, and whole? From their names, sizes and headers; no tensor is read.

An interrupted download leaves a shard out, a link of the hub's cache that leads nowhere, or a file that ends early.
vLLM notices a minute after start-up, under other names. Layout of a file: eight bytes with the length of the header
(little-endian), the header (JSON: tensor → dtype, shape, data_offsets), the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec

from laguna_serve.serving.checkpoint.fields import CheckpointError

PATTERN, MISTRALS = "*.safetensors", "consolidated*.safetensors"
INDEX = "model.safetensors.index.json"
# Formats that vLLM reads as well, and that are left to it.
OTHERS = ("*.bin", "*.pt", "*.pth", "*.gguf")
LENGTH_BYTES = 8
# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
FETCH = "fetch it again"


class WeightIndex(msgspec.Struct, frozen=True):
    """Of model.safetensors.index.json: tensor → the file that has it."""

    weight_map: dict[str, str]


class TensorHeader(msgspec.Struct, frozen=True):
    """What a safetensors header says of a tensor; its bytes lie from the first offset to before the second."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def require_weights(folder: Path, *, complete: bool) -> None:
    """Raise CheckpointError, in one line, for the first file that is missing or not whole.

    `complete` is False for a snapshot of the hub's cache that was asked for by its hub id: what it lacks vLLM fetches.
    """
    files = list_weights(folder)
    for path in files:
        check_file(path)
    missing = [name for name in list_indexed(folder) if not (folder / name).is_file()]
    if missing and complete:
        expected = f"expected {missing[0]}, which {INDEX} names"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: {expected}{more}, got no such file; {FETCH}")
    if not files and complete and not any(next(folder.glob(pattern), None) for pattern in OTHERS):
        raise CheckpointError(f"{folder}: expected weights ({PATTERN}), got none; {FETCH}")


def measure_weights(folder: Path) -> int:
    """Bytes of the safetensors files; 0 where an index names some that are not there, as while they are fetched.

    Raises CheckpointError for a link that leads nowhere, and for an index that is none.
    """
    if not all((folder / name).is_file() for name in list_indexed(folder)):
        return 0
    return sum(_measure(path) for path in list_weights(folder))


def count_values(folder: Path) -> int:
    """Floating-point values in the safetensors files, without scales: the parameters of an unquantised checkpoint.

    Raises:
        CheckpointError: a file that is not whole.
    """
    return sum(
        math.prod(tensor.shape)
        for name, tensor in read_headers(folder).items()
        if tensor.dtype.startswith(("F", "BF")) and not name.endswith("_scales")
    )


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read what the safetensors files say of every tensor. Raises CheckpointError for a file that is not whole."""
    return {name: tensor for path in list_weights(folder) for name, tensor in check_file(path).items()}


def list_weights(folder: Path) -> list[Path]:
    """List the folder's safetensors files, by name. Raises CheckpointError when it cannot be listed.

    Beside an index they are those that it names, as vLLM reads them: others are of another download, or adapters.
    Mistral's releases have the same weights twice, of which vLLM reads one set: theirs is left out beside another.
    """
    try:
        names = os.listdir(folder)  # glob swallows a refusal
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a folder to read, got {error.strerror}; check it") from None
    files = sorted(name for name in names if Path(name).match(PATTERN))
    usual = [name for name in files if not Path(name).match(MISTRALS)]
    indexed = list_indexed(folder)
    return [folder / name for name in [name for name in usual if name in indexed] or usual or files]


def list_indexed(folder: Path) -> list[str]:
    """List the files that an index names, each once; none without an index.

    Raises CheckpointError when it is no index.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        return []
    try:
        index = msgspec.json.decode(path.read_bytes(), type=WeightIndex)
    except OSError as error:
        raise CheckpointError(f"{path}: expected an index of weights, got {error.strerror or error}; {FETCH}") from None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise CheckpointError(f"{path}: expected JSON with a weight_map, got something else; {FETCH}") from None
    return sorted(set(index.weight_map.values()))


def check_file(path: Path) -> dict[str, TensorHeader]:
    """Check what a file's header says of every tensor.

    Raises:
        CheckpointError: the file has no header, or not as many bytes as that says.
    """
    size = _measure(path)
    expected = f"{path}: expected a whole safetensors file"
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{expected}, got one of {size} bytes; {FETCH}")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            whole = length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES)
            parts = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw]) if whole else {}
        parts.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(part, type=TensorHeader) for name, part in parts.items()}
    except OSError as error:
        raise CheckpointError(f"{expected}, got {error.strerror or error}; check its permissions") from None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise CheckpointError(f"{expected}, got one whose header is no such JSON; {FETCH}") from None
    if not whole:
        raise CheckpointError(f"{expected}, got one cut off in its header, or another format; {FETCH}")
    expected_size = LENGTH_BYTES + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size != expected_size:
        raise CheckpointError(f"{expected} of {expected_size} bytes, as its header says, got {size}; {FETCH}")
    return tensors


def _measure(path: Path) -> int:
    """Measure a file's size; a folder, and a link that leads nowhere, are errors of their own."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            target = os.readlink(path)
            why = f"a link to {target}, which is not there (an interrupted download, or a pruned cache)"
            raise CheckpointError(f"{path}: expected weights, got {why}; {FETCH}") from None
        raise CheckpointError(f"{path}: expected weights, got {error.strerror or error}; check it") from None
    if path.is_dir():
        raise CheckpointError(f"{path}: expected weights, got a folder; {FETCH}")
    return status.st_size
