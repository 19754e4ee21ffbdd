"""Rows of vectors on disk, written and read one row at a time: what goes into a layer, and the gradients of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from laguna_serve.serving.kit.files import write_stream


def write_rows(path: Path, rows: Iterable[torch.Tensor]) -> None:
    """Write rows [T, H], one after the other; the file is there when all are. Raises WriteError."""
    write_stream(path, lambda file: [file.write(_to_bytes(row)) for row in rows])


def read_rows(path: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Read what `write_rows` wrote: a row [T, width] for each of `lengths`, on the CPU."""
    with path.open("rb") as file:
        for length in lengths:
            buffer = bytearray(length * width * dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise OSError(f"{path}: expected {len(lengths)} rows, got fewer; remove the folder and begin again")
            yield torch.frombuffer(buffer, dtype=dtype).view(length, width)


def _to_bytes(row: torch.Tensor) -> memoryview:
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = row.detach().cpu().contiguous().view(torch.uint8).numpy()
    return flat.data
