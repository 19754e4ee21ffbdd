"""Write a checkpoint anew file by file: every tensor stays in its file, and may become others on the way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from laguna_serve.scripts.checkpoints.headers import INDEX, ITEM_BYTES, Entry, open_file
from laguna_serve.scripts.checkpoints.output import open_output, write_described, write_files, write_tensors
from laguna_serve.serving.checkpoint import ConfigJson
from laguna_serve.serving.kit.results import JsonObject

Status = Literal["written", "already complete", "dry run"]
# Tensor → its dtype in safetensors' spelling, and its shape.
Planned = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class MirroredSource(ABC):
    """A checked checkpoint, and what becomes of it."""

    folder: Path
    config: ConfigJson
    tensors: dict[str, Entry]
    fingerprint: str

    @property
    def files(self) -> list[str]:
        """List the files of its tensors, in the order in which they are written."""
        return sorted({entry.file for entry in self.tensors.values()})

    @abstractmethod
    def plan(self, file: str) -> Planned:
        """Plan the tensors of an output file."""

    @abstractmethod
    def make(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make what stands in the output for one of its tensors."""

    @abstractmethod
    def describe(self) -> ConfigJson:
        """Describe the output in its config.json."""

    def describe_index(self) -> JsonObject:
        """Describe where the output's tensors are."""
        total = sum(map(self.size, self.files))
        weight_map = {name: file for file in self.files for name in self.plan(file)}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def size(self, file: str) -> int:
        """Bytes of an output file's tensors."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.plan(file).values())


def write_mirrored(
    source: MirroredSource, out: Path | None, arguments: JsonObject, journal: str, *, dry_run: bool
) -> Status:
    """Write what is not there yet, the index and config.json last; say what became of it.

    Args:
        arguments: what else decides about the output.
        journal: its name in the folder.

    Raises:
        CheckpointError: the folder cannot be used, or the disk refuses.
        KeyboardInterrupt: a signal came; the same call continues.
    """
    if out is None or dry_run:
        return "dry run"
    output = open_output(out, source.folder, {"source": source.fingerprint, **arguments}, journal)
    if output.complete:
        return "already complete"
    sizes = {file: source.size(file) for file in source.files}
    with write_files(output, source.folder, sizes, partial(_write_file, source)):
        if (source.folder / INDEX).is_file():
            write_described(output, INDEX, source.describe_index())
        write_described(output, "config.json", source.describe())
    return "written"


def _write_file(source: MirroredSource, file: str, path: Path, advance: Callable[[int], None]) -> None:
    with open_file(source.folder / file) as opened:
        tensors: dict[str, torch.Tensor] = {}
        for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
            made = source.make(name, opened.get_tensor(name))
            tensors |= made
            advance(sum(tensor.nbytes for tensor in made.values()))
        write_tensors(path, tensors, opened.metadata())
        tensors.clear()
