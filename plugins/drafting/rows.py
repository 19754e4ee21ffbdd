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
class Queries:
    """Rows that the drafter computes, request by request: the last token and the masks behind it, [batch, width]."""

    positions: Ints
    slots: Ints


def place_queries(last_positions: Ints, width: int, block_table: Ints, block_size: int) -> Queries:
    """Place rows behind the last committed position of every request.

    Args:
        last_positions: [batch].
        width: rows per request, γ + 1.
        block_table: [batch, blocks]; a row behind its end lies in the last block.
    """
    positions = last_positions[:, None] + np.arange(1, width + 1)
    blocks, within = np.divmod(positions, block_size)
    rows, last_block = np.arange(len(positions))[:, None], block_table.shape[1] - 1
    slots = block_table[rows, np.minimum(blocks, last_block)].astype(np.int64) * block_size + within
    return Queries(positions, slots)
