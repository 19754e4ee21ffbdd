"""Hidden states of the target on disk: what the drafter reads, and the last layer's, from which its choices follow.

The target goes over all rows one layer after the other, so that one layer is in memory at a time, whatever its size.
Rows lie in shards of some 32,768 tokens; of a shard there is

    layer-LLL/shard-SSSSS.bin    [tokens, H] bf16, after layer LLL: the tapped layers, and the last one
    running/shard-SSSSS.LLL      [tokens, H] in the dtype that is computed in: where the pass goes on from

each whole or not at all, so that an interrupted pass goes on with the shard and layer that it was at. A target that
is whole in memory (whole.py) goes over a shard at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from laguna_serve.scripts.checkpoints.output import check_space
from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.drafter.data.target import TargetLayers
from laguna_serve.scripts.training.drafter.data.whole import WholeTarget
from laguna_serve.scripts.training.pruning.streaming.store import read_rows, write_rows
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.signals import check_signals

SHARD_TOKENS = 32_768
# Rows are padded to the longest of a batch and computed together, up to so many tokens.
BATCH_TOKENS = 4_096
STORED = torch.bfloat16


class StatesError(CommandError):
    """States on disk that are not those of the rows; one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `first` to `stop` − 1 of all, whose lengths are known."""

    number: int
    first: int
    stop: int


def list_shards(lengths: Sequence[int], tokens: int = SHARD_TOKENS) -> list[Shard]:
    """Cut rows into shards of at most so many tokens; a longer row has one for itself."""
    shards: list[Shard] = []
    first = held = 0
    for row, length in enumerate(lengths):
        if held and held + length > tokens:
            shards.append(Shard(len(shards), first, row))
            first, held = row, 0
        held += length
    if len(lengths) > first:
        shards.append(Shard(len(shards), first, len(lengths)))
    return shards


def count_bytes(tokens: int, hidden_size: int, kept: int, dtype: torch.dtype) -> int:
    """Bytes on disk of so many tokens with `kept` layers, at the most: two of the running ones are there at once."""
    running = tokens + SHARD_TOKENS
    return hidden_size * (kept * tokens * STORED.itemsize + running * dtype.itemsize)


class States:
    """The states of rows, in a folder of their own."""

    def __init__(self, folder: Path, rows: Sequence[Row], layer_ids: Sequence[int], num_layers: int, width: int):
        """Describe what is, or will be, in the folder: layers of `width` values after which states are kept."""
        self.folder, self._rows, self.width = folder, rows, width
        self.layer_ids, self.last = tuple(layer_ids), num_layers - 1
        lengths = [len(row.tokens) for row in rows]
        self._shards = list_shards(lengths)
        self._shard_of = [shard for shard in self._shards for _ in range(shard.first, shard.stop)]
        self._starts = [0, *itertools.accumulate(lengths)]

    @property
    def kept(self) -> set[int]:
        """Layers whose states are kept."""
        return {*self.layer_ids, self.last}

    def compute(self, layers: TargetLayers, progress: Progress) -> None:
        """Compute what is missing. Ctrl-C and SIGTERM are obeyed between two batches, inside `defer_signals`.

        Raises:
            CheckpointError: the target cannot be read, or there is not enough disk.
            WriteError: the disk is full or refuses.
            KeyboardInterrupt: it was interrupted; what is whole stays.
        """
        reached = [self._find_reached(shard) for shard in self._shards]
        tokens = sum(len(row.tokens) for row in self._rows)
        left = sum(self._count_tokens(s) * (layers.count - r) for s, r in zip(self._shards, reached, strict=True))
        if not left:
            return
        here = sum(path.stat().st_size for path in self.folder.rglob("*.*") if path.is_file())
        check_space(self.folder, max(0, count_bytes(tokens, self.width, len(self.kept), layers.dtype) - here))
        (self.folder / "running").mkdir(parents=True, exist_ok=True)
        if any(reached):
            progress.say(f"hidden states: continues with layer {min(reached)} of {layers.count}")
        progress.begin()
        done = 0
        for number in range(layers.count):
            todo = [shard for shard in self._shards if reached[shard.number] == number]
            layer = layers.load(number) if todo else None
            embedding = layers.load_embedding() if todo and number == 0 else None
            for shard in todo:
                self._advance(shard, number, layer, layers, embedding)
                reached[shard.number] += 1
                done += self._count_tokens(shard)
                progress.step(f"states {number + 1}/{layers.count}", done, left)

    def compute_whole(self, target: WholeTarget, progress: Progress) -> None:
        """Compute what is missing as `compute` does, with a target that is whole in memory."""
        left = [shard for shard in self._shards if self._find_reached(shard) <= self.last]
        if not left:
            return
        tokens = sum(self._count_tokens(shard) for shard in left)
        check_space(self.folder, self.width * len(self.kept) * tokens * STORED.itemsize)
        if len(left) < len(self._shards):
            progress.say(f"hidden states: continues with shard {left[0].number + 1} of {len(self._shards)}")
        progress.begin()
        done = 0
        for shard in left:
            kept: dict[int, list[torch.Tensor]] = {number: [] for number in sorted(self.kept)}
            for batch in _batch(row.tokens for row in self._rows[shard.first : shard.stop]):
                check_signals()
                for number, rows in target.run(batch, self.kept).items():
                    kept[number] += [states.to(STORED) for states in rows]
                done += sum(map(len, batch))
                progress.step("states", done, tokens)
            for number, rows in kept.items():  # the last layer's behind all others: with it the shard is done
                self._path(number, shard).parent.mkdir(parents=True, exist_ok=True)
                write_rows(self._path(number, shard), rows)

    def _advance(
        self, shard: Shard, number: int, layer: object, layers: TargetLayers, embedding: torch.Tensor | None
    ) -> None:
        """Take a shard through one layer."""
        outputs = list(_run(layer, number, layers, self._read_inputs(shard, number, layers, embedding)))
        if number in self.kept:
            path = self._path(number, shard)
            path.parent.mkdir(exist_ok=True)
            write_rows(path, (states.to(STORED) for states in outputs))
        if number < self.last:
            write_rows(self._running(number, shard), outputs)
        self._running(number - 1, shard).unlink(missing_ok=True)

    def _read_inputs(
        self, shard: Shard, number: int, layers: TargetLayers, embedding: torch.Tensor | None
    ) -> Iterable[torch.Tensor]:
        rows = self._rows[shard.first : shard.stop]
        if embedding is not None:
            return (F.embedding(row.tokens.to(layers.device), embedding) for row in rows)
        lengths = [len(row.tokens) for row in rows]
        stored = read_rows(self._running(number - 1, shard), lengths, self.width, layers.dtype)
        return (states.to(layers.device) for states in stored)

    def _find_reached(self, shard: Shard) -> int:
        """Find the first layer that a shard has not been through."""
        if self._path(self.last, shard).exists():
            return self.last + 1
        found = [int(path.suffix[1:]) + 1 for path in (self.folder / "running").glob(f"shard-{shard.number:05}.*")]
        return max(found, default=0)

    def read(self, layer: int, row: int, length: int) -> torch.Tensor:
        """Read the states [length, H] bf16 of a row's first tokens after a layer."""
        shard = self._shard_of[row]
        skipped = self._starts[row] - self._starts[shard.first]
        size = self.width * STORED.itemsize
        buffer = bytearray(length * size)
        path = self._path(layer, shard)
        with path.open("rb", buffering=0) as file:
            file.seek(skipped * size)
            if file.readinto(buffer) != len(buffer):
                raise StatesError(
                    f"{path}: expected the states of {len(self._rows)} rows, got fewer; remove the folder"
                )
        return torch.frombuffer(buffer, dtype=STORED).view(length, self.width)

    def read_context(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """Read the tapped states [B, length, taps, H] fp32 of rows, zeros behind the end of one."""
        context = torch.zeros(len(rows), length, len(self.layer_ids), self.width)
        for place, row in enumerate(rows):
            known = min(length, len(self._rows[row].tokens))
            for tap, layer in enumerate(self.layer_ids):
                context[place, :known, tap] = self.read(layer, row, known)
        return context

    def _count_tokens(self, shard: Shard) -> int:
        return self._starts[shard.stop] - self._starts[shard.first]

    def _path(self, layer: int, shard: Shard) -> Path:
        return self.folder / f"layer-{layer:03}" / f"shard-{shard.number:05}.bin"

    def _running(self, layer: int, shard: Shard) -> Path:
        return self.folder / "running" / f"shard-{shard.number:05}.{layer:03}"


@torch.no_grad()
def _run(layer: object, number: int, layers: TargetLayers, inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Run a layer on rows; those of a batch are padded on the right, which causal attention does not see."""
    for batch in _batch(inputs):
        check_signals()
        padded = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
        output: torch.Tensor = layer(padded, **layers.surround(padded, number))  # type: ignore[operator]
        yield from (states[: len(row)].cpu() for states, row in zip(output, batch, strict=True))


def _batch(inputs: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for row in inputs:
        longest = max(len(row), *map(len, batch)) if batch else len(row)
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
