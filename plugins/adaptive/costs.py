"""What does a step cost? Tables by requests and by rows per request, filled by the engine's own steps; pure.

A step's time is that of the target, over one row per request and the drafted ones, and that of the drafter's pass
behind it.  Both have a table: cells by (requests, drafted tokens per request).  What was never measured follows from
what was: cells of the same number of requests scale their neighbours, and those of the next numbers give the shape.
Only ratios decide, so that times are kept in units of the machine's present *pace*, which follows every step quickly,
while cells follow it slowly: other work on the machine slows all of them alike.  One wild step moves nothing by more
than a fixed factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# A cell is the median of its first measurements; then each further one counts as much as any before it, up to this.
FIRST, CELL_MEMORY = 5, 64
PACE_RATE = 1 / 8
# Natural logarithm of the largest factor by which one measurement is believed to differ.
MOST_SURPRISE = 0.4
# Measurements after which a table is read anew, beyond those of new cells.
READ_AGAIN = 16
# Numbers of requests that share a cell: exact up to this, then within a fifth.
EXACT_REQUESTS, BUCKETS_PER_DOUBLING = 8, 4
# Before anything was measured, in steps without drafts: the target's by drafted tokens per request, and the drafter's.
VERIFY_FIRST, VERIFY_EACH = 1.3, 0.08
DRAFT_FIRST, DRAFT_EACH = 0.35, 0.02


class Pace:
    """How slow the machine is now, as a factor on every cell."""

    def __init__(self) -> None:
        self.log = 0.0

    def follow(self, surprise: float) -> None:
        """Move towards a measurement whose logarithm is off by so much."""
        self.log += PACE_RATE * surprise


class Cell:
    """The logarithm of a time, from measurements of it."""

    __slots__ = ("count", "first", "value")

    def __init__(self) -> None:
        self.first: list[float] = []
        self.count, self.value = 0, 0.0

    def observe(self, measured: float, pace: Pace) -> None:
        """Take in the logarithm of a time as measured, at a pace that follows it."""
        steady = measured - pace.log
        self.count += 1
        if self.count <= FIRST:  # these say nothing about the machine, and may be those of a cold start
            self.first.append(steady)
            self.value = sorted(self.first)[(self.count - 1) // 2]
            return
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, steady - self.value))
        pace.follow(surprise)
        self.value += surprise / min(self.count, CELL_MEMORY)


class CostTable:
    """Times by (requests, level), in seconds at pace 1; `prior[level]` is the shape before anything was measured."""

    def __init__(self, prior: Sequence[float], pace: Pace) -> None:
        self._prior, self._pace = list(prior), pace
        # Bucket → level → cell.
        self._cells: dict[int, dict[int, Cell]] = {}
        self._curves: dict[int, list[float]] = {}
        self._unread = 0

    def observe(self, requests: int, level: int, seconds: float) -> None:
        """Take in a measured time."""
        cells = self._cells.setdefault(find_bucket(requests), {})
        cell = cells.get(level)
        if cell is None:
            cell = cells[level] = Cell()
        cell.observe(math.log(max(seconds, 1e-7)), self._pace)
        self._unread += 1
        if cell.count <= FIRST or self._unread >= READ_AGAIN:
            self._curves.clear()
            self._unread = 0

    def curve(self, requests: int) -> list[float]:
        """Return the time by level, for so many requests; never falling from level 1 on."""
        bucket = find_bucket(requests)
        curve = self._curves.get(bucket)
        if curve is None:
            curve = list(self._prior)
            # From the farthest number of requests to this one, each correcting what those before it say.
            for other in sorted(self._cells, key=lambda other: -abs(other - bucket))[-3:]:
                curve = _correct(curve, self._cells[other])
            self._curves[bucket] = curve
        return curve

    def count(self, requests: int, level: int) -> int:
        """Count the measurements of a cell."""
        cell = self._cells.get(find_bucket(requests), {}).get(level)
        return 0 if cell is None else cell.count

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not self._cells


def find_bucket(requests: int) -> int:
    """Find the number of requests' row of cells: exact for few, then by the logarithm."""
    if requests <= EXACT_REQUESTS:
        return requests
    return EXACT_REQUESTS + round(BUCKETS_PER_DOUBLING * math.log2(requests / EXACT_REQUESTS))


def _correct(curve: list[float], cells: dict[int, Cell]) -> list[float]:
    """Scale a curve so that it goes through the cells: in between by their factors' line, beyond by the last one's."""
    known = [(level, time / curve[level]) for level, time in _smooth(cells) if curve[level]]
    return [time * _interpolate(known, level) for level, time in enumerate(curve)]


def _smooth(cells: dict[int, Cell]) -> list[tuple[int, float]]:
    """List (level, time), never falling from level 1 on: cells that contradict each other are averaged by their counts.

    So does a cell of one cold measurement not stand against many (isotonic regression, adjacent violators pooled).
    """
    blocks: list[tuple[list[int], float, float]] = []
    for level in sorted(cells):
        levels, weight, time = [level], float(cells[level].count), math.exp(cells[level].value)
        while blocks and blocks[-1][0][0] > 0 and blocks[-1][2] > time:
            before, others, other = blocks.pop()
            levels, time = before + levels, (other * others + time * weight) / (others + weight)
            weight += others
        blocks.append((levels, weight, time))
    return [(level, time) for levels, _, time in blocks for level in levels]


def _interpolate(known: list[tuple[int, float]], level: int) -> float:
    if level <= known[0][0]:
        return known[0][1]
    for (left, low), (right, high) in pairwise(known):
        if level <= right:
            return low + (high - low) * (level - left) / (right - left)
    return known[-1][1]


def read(curve: Sequence[float], level: float) -> float:
    """Read a curve between its levels; below 1 from the first drafted level's cost, which is mostly fixed."""
    low = int(level)
    if low >= len(curve) - 1:
        return curve[-1]
    if low == 0:
        slope = curve[2] - curve[1] if len(curve) > 2 else 0.0
        return max(curve[0], curve[1] - slope * (1 - level)) if level else curve[0]
    return curve[low] + (curve[low + 1] - curve[low]) * (level - low)


class StepCosts:
    """Both tables: the target's at level 0 (no drafts) to `width`, the drafter's at level 1 to `width`."""

    def __init__(self, width: int) -> None:
        self.width = width
        pace = Pace()
        self.verify = CostTable([1.0, *(VERIFY_FIRST + VERIFY_EACH * level for level in range(width))], pace)
        self.draft = CostTable([0.0, *(DRAFT_FIRST + DRAFT_EACH * level for level in range(width))], pace)

    def observe(self, requests: int, drafted: int, target_s: float, width: int, drafter_s: float) -> None:
        """Take in a step over `requests` rows and `drafted` more, and the pass for `width` tokens behind it."""
        level = max(1, round(drafted / requests)) if drafted else 0
        self.verify.observe(requests, min(level, self.width), target_s)
        if width:
            self.draft.observe(requests, width, drafter_s)

    def find_draft_curve(self, requests: int) -> list[float]:
        """Return the drafter's time by width; before it was measured in proportion to the target's."""
        curve = self.draft.curve(requests)
        if self.draft.is_empty:
            plain = self.verify.curve(requests)[0]
            curve = [plain * share for share in curve]
        return curve
