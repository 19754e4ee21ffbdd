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


def count_rows(survivals: Sequence[Sequence[float]], width: int, least: float) -> tuple[int, ...]:
    """Count each request's drafts of a pass so wide that have a chance of at least `least`."""
    alike = {id(each): each for each in survivals}
    counts = {key: sum(chance >= least for chance in each[:width]) for key, each in alike.items()}
    return round_rows([counts[id(each)] for each in survivals])
