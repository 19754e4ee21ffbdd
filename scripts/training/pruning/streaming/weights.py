"""A checkpoint's tensors, read one at a time by plain reads: nothing is mapped, so nothing stays behind in memory.

FP8 weights come out dequantised: value times scale, the scale that of a 128×128 block (compressed-tensors'
`float-quantized`, as the releases have it), of a row, or of the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.plugins.formats.fp8 import dequantise_blocks
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson
from laguna_serve.serving.checkpoint.quantisation import FP8, read_quantisation
from laguna_serve.serving.checkpoint.stored.weight_files import TensorHeader, check_file, list_weights, require_weights

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
}
SCALE, BLOCK = "_scale", 128
SCORE_OTHER = "score the bf16 or FP8 release: the mask fits this one as well"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: in which file, from which byte on."""

    path: Path
    start: int
    header: TensorHeader

    @property
    def num_bytes(self) -> int:
        """Bytes as it is stored."""
        begin, end = self.header.data_offsets
        return end - begin


class Weights:
    """The tensors of a checkpoint in bf16, fp16, fp32 or FP8."""

    def __init__(self, folder: Path, config: ConfigJson, remedy: str = SCORE_OTHER) -> None:
        """Read every header; `remedy`: what to do about weights that are quantised otherwise.

        Raises:
            CheckpointError: files that are missing or not whole; weights that are quantised otherwise.
        """
        quantisation = read_quantisation(folder, config)
        if quantisation is not None and quantisation.kind != FP8:
            expected = "weights in bf16, fp16, fp32 or FP8 (compressed-tensors' float-quantized)"
            raise CheckpointError(f"{folder}: expected {expected}, got {quantisation.name}; {remedy}")
        require_weights(folder, complete=True)
        self._folder = folder
        self._stored = {name: tensor for path in list_weights(folder) for name, tensor in _list_tensors(path)}

    def __contains__(self, name: str) -> bool:
        """Say whether there is such a tensor."""
        return name in self._stored

    def names(self) -> list[str]:
        """List every tensor, scales too."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read a tensor's shape. Raises CheckpointError when there is none of that name."""
        return self._find(name).header.shape

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, without its scales."""
        return self._find(name).num_bytes

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor: as it is stored, or in fp32 when that is FP8.

        Raises:
            CheckpointError: there is none of that name; its dtype is another, or its scales do not fit.
        """
        values = self.read_stored(name)
        if values.dtype != torch.float8_e4m3fn:
            return values
        return dequantise(values, self.read_stored(name + SCALE), name)

    def read_stored(self, name: str) -> torch.Tensor:
        """Read a tensor as it is stored. Raises as `read`."""
        stored = self._find(name)
        dtype = DTYPES.get(stored.header.dtype)
        if dtype is None:
            expected = f"one of {', '.join(DTYPES)}"
            raise CheckpointError(f"{stored.path}: expected {name} in {expected}, got {stored.header.dtype}")
        buffer = bytearray(stored.num_bytes)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            view = memoryview(buffer)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{stored.path}: expected a whole file, got one cut off; fetch it again")
                view = view[count:]
        return torch.frombuffer(buffer, dtype=dtype).view(stored.header.shape)

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self._folder}: expected the tensor {name}, got none; fetch the weights again")
        return self._stored[name]


def dequantise(values: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """FP8 values [R, C] times the scale of their block [⌈R/128⌉, ⌈C/128⌉], row [R, 1] or matrix [1], in fp32.

    Raises:
        CheckpointError: scales of another shape; the message begins with `name`.
    """
    R, C = values.shape
    blocks = (-(-R // BLOCK), -(-C // BLOCK))
    if tuple(scale.shape) == blocks:
        return dequantise_blocks(values, scale)
    if scale.numel() != 1 and tuple(scale.shape) != (R, 1):
        expected = f"scales {list(blocks)}, one per {BLOCK}×{BLOCK} block"
        raise CheckpointError(f"{name}: expected {expected}, got {list(scale.shape)}; fetch it again")
    return values.float().mul_(scale.float())


def _list_tensors(path: Path) -> list[tuple[str, StoredTensor]]:
    headers = check_file(path)
    start = path.stat().st_size - max((header.data_offsets[1] for header in headers.values()), default=0)
    return [(name, StoredTensor(path, start + header.data_offsets[0], header)) for name, header in headers.items()]
