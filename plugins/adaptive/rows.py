"""Numbers of rows that come again: for each one that is new oneDNN makes its products anew, milliseconds of a step."""

from __future__ import annotations

from collections.abc import Sequence

ROWS_STEP = 8


def round_rows(counts: Sequence[int]) -> tuple[int, ...]:
    """Leave out so many drafts, of the longest first, that a step's rows are a multiple of ROWS_STEP.

    Few requests keep theirs, and nobody's are left out to the last.
    """
    surplus = (len(counts) + sum(counts)) % ROWS_STEP if len(counts) > ROWS_STEP else 0
    rounded = list(counts)
    for index in sorted(range(len(counts)), key=lambda index: -counts[index])[:surplus]:
        rounded[index] = max(0, rounded[index] - 1)
    return tuple(rounded if any(rounded) else counts)
