"""Writing a store: by the teacher in memory, by its layers one at a time, or through a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.layerwise.hidden import HiddenStates
from laguna_serve.scripts.training.dense.losses import Top, find_top, read_top
from laguna_serve.scripts.training.dense.store.format import HEADER, StoreHeader, read_header, shard_path, write_missing
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES, Batch, Drawn
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.signals import check_signals

Answer = Callable[[int, Batch], Sequence[Top]]


def batch_of(drawn: Drawn, number: int) -> Batch:
    """Return a store's batch by its number: the held-out ones come first."""
    return drawn.held_out(number) if number < HELD_OUT_BATCHES else drawn.batch(number - HELD_OUT_BATCHES)


def is_made(folder: Path, wanted: StoreHeader) -> bool:
    """Say whether a folder holds all of the logits that are wanted, whoever gave them."""
    if not (folder / HEADER).exists():
        return False
    found = read_header(folder)
    whole = all(shard_path(folder, number).exists() for number in range(found.shards))
    return whole and msgspec.structs.replace(found, source=wanted.source) == wanted


def write_by_model(folder: Path, header: StoreHeader, drawn: Drawn, teacher: LagunaForCausalLM) -> None:
    """Write what is missing by a teacher in memory."""

    def answer(_number: int, batch: Batch) -> list[Top]:
        ids, predicted = batch.ids.to(teacher.device), batch.predicted.to(teacher.device)
        rows = (slice(row, row + 1) for row in range(len(ids)))
        return [read_top(teacher, ids[row], predicted[row], header.top_k) for row in rows]

    write_by(folder, header, drawn, answer)


def write_by_layers(folder: Path, header: StoreHeader, drawn: Drawn, layers: Layers, work: Path, ranks: Ranks) -> None:
    """Write what is missing by the teacher's layers one at a time; rows are shared by the processes.

    Raises:
        DiskError: there is no room for two layers' hidden states.
    """
    total = header.batches + HELD_OUT_BATCHES
    hidden = HiddenStates(
        work / "store-hidden",
        layers,
        total,
        header.rows,
        header.length,
        lambda number: batch_of(drawn, number).ids,
        ranks,
    )
    hidden.require_room(2)
    last = int(layers.config.num_hidden_layers)
    for number in range(last + 1):
        hidden.advance(number)
        hidden.drop_before(number)
    if ranks.first:
        head, states = layers.load_head(), hidden.open(last)

        @torch.no_grad()
        def answer(number: int, batch: Batch) -> list[Top]:
            pairs = zip(states[number].to(layers.device), batch.predicted.to(layers.device), strict=True)
            return [find_top(head(row[:-1][predicted]), header.top_k) for row, predicted in pairs]

        write_by(folder, header, drawn, answer)
        del states
    hidden.drop_before(last + 1)


def write_by(folder: Path, header: StoreHeader, drawn: Drawn, answer: Answer) -> None:
    """Write what is missing of the answers, with progress; stopped between two batches, whole shards stay."""
    progress = Progress()

    def tell(done: int, total: int) -> None:
        check_signals()
        progress.step("store", done, total)

    write_missing(folder, header, lambda number: batch_of(drawn, number), answer, tell)
