"""Token ids on disk, written as the text is read and mapped into memory, so that no corpus lies there whole.

A folder holds ids.bin (uint32), spoken.bin (uint8: which of them the assistant says), starts.bin (int64: where each
document begins, and the end) and, written last, tokens.json with what they were made of.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from laguna_serve.serving.kit.files import explain_write, write_json

FILES: dict[str, np.dtype[Any]] = {
    "ids": np.dtype(np.uint32),
    "spoken": np.dtype(np.uint8),
    "starts": np.dtype(np.int64),
}
HEADER = "tokens.json"
DIGEST_BLOCK = 1 << 22
Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Documents end to end.

    Attributes:
        ids: [N] uint32.
        spoken: [N] uint8, 1 where the assistant says it.
        starts: [D + 1] int64: document d is ids[starts[d]:starts[d + 1]].
    """

    ids: npt.NDArray[np.uint32]
    spoken: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1

    def digest(self) -> str:
        """SHA-256 of ids, of who says them and of where documents begin, in hex."""
        found = hashlib.sha256()
        for array in (self.ids, self.spoken, self.starts):
            for start in range(0, len(array), DIGEST_BLOCK):
                found.update(array[start : start + DIGEST_BLOCK].tobytes())
        return found.hexdigest()


def open_tokens(folder: Path, key: dict[str, str]) -> Tokens | None:
    """Map what `write_tokens` wrote for this key; None where there is nothing, or something else's."""
    header = folder / HEADER
    if not header.exists() or json.loads(header.read_text()) != key:
        return None
    return Tokens(**{name: _map(folder / f"{name}.bin", dtype) for name, dtype in FILES.items()})


def write_tokens(encoded: Iterable[Encoded], folder: Path | None, key: dict[str, str]) -> Tokens:
    """Write documents as they come, and map them.

    Args:
        folder: None for files without a name, which are gone with the object.
        key: what they are made of, for `open_tokens`.

    Raises:
        WriteError: the disk is full or refuses.
    """
    if folder is not None:
        (folder / HEADER).unlink(missing_ok=True)  # of other tokens, whose files are written over
    try:
        tokens = _write_and_map(encoded, folder)
    except OSError as error:  # also of closing the files
        raise explain_write(folder, error) from None
    if folder is not None:
        write_json(folder / HEADER, key)
    return tokens


def _write_and_map(encoded: Iterable[Encoded], folder: Path | None) -> Tokens:
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name in FILES:
            if folder is None:
                files[name] = stack.enter_context(tempfile.TemporaryFile())
            else:
                folder.mkdir(parents=True, exist_ok=True)
                files[name] = stack.enter_context((folder / f"{name}.bin").open("w+b"))
        _write_documents(encoded, files)
        return Tokens(**{name: _map(files[name], dtype) for name, dtype in FILES.items()})


def _write_documents(encoded: Iterable[Encoded], files: Mapping[str, BinaryIO]) -> None:
    at = 0
    files["starts"].write(np.int64(at).tobytes())
    for ids, spoken in encoded:
        at += len(ids)
        files["ids"].write(np.array(ids, FILES["ids"]).tobytes())
        files["spoken"].write(np.array(spoken, FILES["spoken"]).tobytes())
        files["starts"].write(np.int64(at).tobytes())
    for file in files.values():
        file.flush()


def _map(file: Path | BinaryIO, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    empty = file.stat().st_size == 0 if isinstance(file, Path) else file.seek(0, 2) == 0
    # There is no map of nothing.
    return np.empty(0, dtype) if empty else np.memmap(file, dtype, mode="r")
