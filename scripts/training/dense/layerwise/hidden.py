"""The hidden states of many rows in front of a layer, in files that are mapped into memory.

Layer after layer is read from the shards, run over all rows, and let go. Several processes share the rows: each
computes and writes its own part of the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import torch

from laguna_serve.scripts.training.loop import is_asked_to_stop
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.machine.memory import GIB


class DiskError(CommandError, OSError):
    """There is no room for the hidden states, as one line."""


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """Hidden states of B batches of R rows of L tokens, in front of some of the layers.

    Attributes:
        ids: number of a batch → its tokens [R, L].
    """

    folder: Path
    layers: Layers
    batches: int
    rows: int
    length: int
    ids: Callable[[int], torch.Tensor]
    ranks: Ranks

    @property
    def num_bytes(self) -> int:
        """Bytes in front of one layer."""
        return self.batches * self.rows * self.length * int(self.layers.config.hidden_size) * self.layers.dtype.itemsize

    def require_room(self, layers_at_once: int) -> None:
        """Refuse to begin where the disk has no room for so many layers' states. Raises DiskError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in self.folder.glob("*.bin"))
        need, free = layers_at_once * self.num_bytes, disk_usage(self.folder).free + there
        if need > free:
            sizes = f"expected {need / GIB:.1f} GiB free for hidden states, got {free / GIB:.1f}"
            raise DiskError(f"{self.folder}: {sizes}; train on fewer batches, or name another --work")

    def open(self, layer: int) -> torch.Tensor:
        """Map the states in front of a layer: [B, R, L, H]; what is written to them is in the file."""
        shape = (self.batches, self.rows, self.length, int(self.layers.config.hidden_size))
        count = shape[0] * shape[1] * shape[2] * shape[3]
        states = torch.from_file(str(self._path(layer)), shared=True, size=count, dtype=self.layers.dtype)
        return states.view(shape)

    def run(self, number: int, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Run a layer on a batch's states [R, L, H], as mapped, on the layers' device."""
        states = states.to(self.layers.device)
        output: torch.Tensor = layer(states, **self.layers.surround(states, number))
        return output

    @torch.no_grad()
    def advance(self, to: int) -> None:
        """Compute the states in front of layer `to`, from the last layer in front of which they are."""
        at = max((layer for layer in range(to + 1) if self._is_whole(layer)), default=None)
        self.ranks.wait()
        if at is None:
            embedding = self.layers.load_embedding()
            self._write(0, lambda batch: embedding[self.ids(batch).to(embedding.device)])
            at = 0
        for number in range(at, to):
            layer, before = self.layers.load(number), self.open(number)
            self._write(number + 1, lambda batch: self.run(number, layer, before[batch]))  # noqa: B023

    def drop_before(self, layer: int) -> None:
        """Remove the states in front of earlier layers."""
        self.ranks.wait()
        if self.ranks.first:
            for earlier in range(layer):
                self._mark(earlier).unlink(missing_ok=True)
                self._path(earlier).unlink(missing_ok=True)
        self.ranks.wait()

    def _write(self, layer: int, states_of: Callable[[int], torch.Tensor]) -> None:
        if self.ranks.first:
            with self._path(layer).open("wb") as file:
                file.truncate(self.num_bytes)
        self.ranks.wait()
        states = self.open(layer)
        share, progress = self.ranks.share(self.batches), Progress(quiet=not self.ranks.first)
        for batch in range(share.start, share.stop):
            states[batch] = states_of(batch).cpu()
            progress.step(f"layer {layer}", batch + 1 - share.start, share.stop - share.start)
        if is_asked_to_stop(self.ranks):
            raise KeyboardInterrupt
        if self.ranks.first:
            self._mark(layer).touch()
        self.ranks.wait()

    def _is_whole(self, layer: int) -> bool:
        return self._mark(layer).exists()

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.bin"

    def _mark(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.whole"
