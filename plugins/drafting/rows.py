"""Which rows of a verified step a DFlash drafter reads, and what it is asked next; NumPy and lists, nothing of vLLM.

On a GPU nobody knows at this point how many drafts were accepted, so that vLLM works it out by kernels on padded rows.
On a CPU the tokens are there, and a few operations on small arrays replace some sixty of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.repairs.row_counts import pad

Ints = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a step, per request.

    Attributes:
        last: the token that the next draft begins with.
        rejected: drafts that were verified in vain, the last rows of a request's.
    """

    last: list[int]
    rejected: list[int]


def read_accepted(
    sampled: Sequence[Sequence[int]], drafted: Sequence[int] | None, vocabulary: int, backup: Sequence[int | None]
) -> Accepted:
    """Read the tokens of a step.

    Args:
        sampled: per request, -1 behind its last.
        drafted: how many drafts each verified; None for a step without any.
        backup: of a request that still reads its prompt, the prompt's next token: what was sampled is dropped.
    """
    last, rejected = [], []
    for index, row in enumerate(sampled):
        instead = backup[index]
        tokens = [token for token in row if token != -1 and token < vocabulary] if instead is None else []
        count = drafted[index] if drafted is not None else 0
        last.append(tokens[-1] if tokens else -1 if instead is None else instead)
        rejected.append(count + 1 - len(tokens) if count else 0)
    return Accepted(last, rejected)


def find_kept(bounds: Sequence[int], rejected: Sequence[int]) -> slice | Ints:
    """Find the rows of a step that hold committed tokens; a slice where they lie together.

    They are each request's from `bounds` to the next bound, but for its last `rejected`; and the last of all again, to
    a number that comes again.
    """
    kept = [(bounds[i], bounds[i + 1] - count) for i, count in enumerate(rejected)]
    count = sum(end - begin for begin, end in kept)
    added = pad(count) - count
    if not added and (len(kept) == 1 or not any(rejected[:-1])):
        return slice(kept[0][0], kept[-1][1])
    rows: Ints = np.concatenate([np.arange(begin, end) for begin, end in kept])
    return np.pad(rows, (0, added), mode="edge")


@dataclass(frozen=True, slots=True)
class Verified:
    """Which rows verify drafts: of each request as many as it has drafts, and the one behind them.

    Attributes:
        logits: [drafts + batch] int32, these rows' places in the step.
        target: [drafts] int32, the rows of drafts among these.
        bonus: [batch] int32, the last of each request among these.
    """

    logits: Ints
    target: Ints
    bonus: Ints


def find_verified(drafts: Ints, ends: Ints) -> Verified:
    """Find the rows that verify; drafts int32 [batch], ends [batch], where each request's rows of the step end."""
    counts = drafts + 1
    bonus = counts.cumsum(dtype=np.int32) - 1
    rows = np.arange(bonus[-1] + 1, dtype=np.int32)
    logits = rows + np.repeat(ends - 1 - bonus, counts)
    is_target = np.ones(len(rows), bool)
    is_target[bonus] = False
    return Verified(logits.astype(np.int32, copy=False), rows[is_target], bonus)


@dataclass(frozen=True, slots=True)
class Queries:
    """Where the drafter's rows go, request by request: the last token and the masks behind it.

    Attributes:
        ids: int32, positions, slots: int64, each of at least batch · width.
        lengths: int32 [batch], each request's length with these rows.
    """

    ids: Ints
    positions: Ints
    slots: Ints
    lengths: Ints


def place_queries(
    accepted: Accepted,
    bounds: Sequence[int],
    positions: Ints,
    lengths: Ints,
    block_table: Ints,
    block_size: int,
    mask: int,
    width: int,
    queries: Queries,
) -> None:
    """Place rows behind the last committed position of every request.

    Args:
        accepted: what became of the step.
        bounds: [batch + 1] of the step's rows, as of `find_kept`.
        positions: int64 [rows] of the step.
        lengths: int32 [batch] of the step's sequences, rejected drafts among them.
        block_table: int32 [batch, blocks]; a row behind its end lies in the last block.
        block_size: tokens of a block.
        mask: the token that stands for one to draft.
        width: rows per request, γ + 1.
        queries: is filled.
    """
    batch, rejected = len(accepted.last), np.array(accepted.rejected)
    rows = batch * width
    queries.lengths[:batch] = lengths[:batch] - rejected + width
    before = positions[np.array(bounds[1:]) - 1 - rejected]
    placed = (before[:, None] + np.arange(1, width + 1)).ravel()
    blocks = np.minimum(placed // block_size, block_table.shape[1] - 1)
    queries.positions[:rows] = placed
    queries.slots[:rows] = block_table[np.arange(rows) // width, blocks] * np.int64(block_size) + placed % block_size
    queries.ids[:rows] = mask
    queries.ids[:rows:width] = accepted.last
