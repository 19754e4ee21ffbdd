"""Nats per byte of texts: a loss that does not depend on the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.scripts.training.dante.losses import IGNORED, sequence_cross_entropy
from laguna_serve.scripts.training.dante.records import Prompt
from laguna_serve.scripts.training.dante.rows import encode_prompt


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that is scored, after a context that is not; the context may be empty."""

    context: Prompt
    text: str


@torch.no_grad()
def measure_passages(
    model: Any, tokenizer: Any, passages: Sequence[Passage], length: int, batch: int = 16
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Measure summed nats [R] of the texts' tokens, and the texts' bytes [R]; what goes beyond `length` is in neither.

    The first token of a text without a context is not scored where the tokenizer puts nothing before it.
    """
    rows = [_encode(passage, tokenizer, length) for passage in passages]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    nats = np.zeros(len(rows))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        longest = max(len(rows[place][0]) for place in places)
        ids = torch.zeros(len(places), longest, dtype=torch.int64)
        labels = torch.full((len(places), longest), IGNORED)
        for number, place in enumerate(places):
            row, scored, _ = rows[place]
            ids[number, : len(row)] = torch.tensor(row)
            labels[number, len(row) - scored : len(row)] = torch.tensor(row[len(row) - scored :])
        labels[:, 0] = IGNORED
        counts = (labels != IGNORED).sum(1)
        # Causal: what stands right of a row does not reach it.
        logits = model(input_ids=ids.to(model.device)).logits.cpu()
        nats[places] = (sequence_cross_entropy(logits, labels) * counts).double().numpy()
    return nats, np.array([num_bytes for _, _, num_bytes in rows], dtype=np.int64)


def _encode(passage: Passage, tokenizer: Any, length: int) -> tuple[list[int], int, int]:
    """Return ids, how many of the last ones are scored, and the bytes of those."""
    context = encode_prompt(passage.context, tokenizer)
    encoded = tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = max(1, length - len(context))
    ids, ends = list(encoded["input_ids"])[:room], [end for _, end in encoded["offset_mapping"]][:room]
    return [*context, *ids], len(ids), len(passage.text[: ends[-1]].encode()) if ends else 0
