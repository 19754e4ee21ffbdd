"""The drafter of the row-matched control: as the candidate's in everything but its weights, which are random.

The target then verifies γ + 1 rows per step as the candidate does, and next to nothing is accepted: what differs from
plain decoding is the arithmetic of those rows alone. (On a GPU vLLM's synthetic acceptance at length 1.0 does the same
without a drafter's passes; its CPU rejection sampler ignores that setting.)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

SCALE = 0.02  # as initialised models have it: nothing overflows
BLOCK = 1 << 22  # values drawn at once


def write_blank_drafter(source: Path, folder: Path, seed: int) -> None:
    """Copy a drafter and replace every floating-point tensor by normal random values; tables of ids stay.

    The folder appears under its name when it is whole. Layout of the files:
    https://github.com/huggingface/safetensors#format.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, part / path.name)
    rng = np.random.default_rng(seed)
    for path in sorted(part.glob("*.safetensors")):
        _randomise(path, rng)
    part.rename(folder)


def _randomise(path: Path, rng: np.random.Generator) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r+", offset=8 + length)
    for name, tensor in header.items():
        if name == "__metadata__" or tensor["dtype"] not in ("BF16", "F16", "F32"):
            continue
        start, end = tensor["data_offsets"]
        width = 4 if tensor["dtype"] == "F32" else 2
        for first in range(start, end, BLOCK * width):
            last = min(end, first + BLOCK * width)
            values = rng.normal(scale=SCALE, size=(last - first) // width).astype(np.float32)
            data[first:last] = _encode(values, tensor["dtype"])
    data.flush()


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Encode float32 values as bytes of a tensor's dtype; bfloat16 is the upper half of a float32."""
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
