"""What does a step cost? Tables by requests and by rows per request, filled by the engine's own steps; pure.

A step's time is that of the target, over one row per request and the drafted ones, and that of the drafter's pass
behind it. Both have a table: cells by (requests, drafted tokens per request). What was never measured follows from
what was: cells of the same number of requests scale their neighbours, and those of the next numbers give the shape.
What was not measured for long is forgotten, and so tried again.
Only ratios decide, so that times are kept in units of the machine's present *pace*, which follows every step quickly,
while cells follow it slowly: other work on the machine slows all of them alike. One wild step moves nothing by more
than a fixed factor.

A step that also reads prompts takes a time per prompt token beside its cell's, for the target and, for the context of
those tokens, in the drafter's pass. Each table learns its own from steps of one cell that read more and less; what it
leaves of a step's time is a measurement of the cell, worth as much as its share of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from laguna_serve.plugins.adaptive.prompt_rate import MOST_SURPRISE, PromptRate

# A cell is the median of its last measurements while they are few: those of a cold machine are soon forgotten. Then
# each further one counts as much as any before it, up to this.
FIRST, FEW, CELL_MEMORY = 5, 16, 64
PACE_RATE = 1 / 8
# What must be left of a step beside its prompts, as a share, to be a measurement.
LEAST_SHARE = 0.15
# Measurements after which a table is read anew, beyond those of new cells.
READ_AGAIN = 16
# Measurements of a number of requests after which a cell of it that was in none of them is forgotten, and how often
# that is looked for: what it says may be of a busy hour, and keeps what would correct it from being tried.
STALE, LOOKED_EVERY = 256, 32
# Measurements of a table after which a cell that was in none of them says nothing of other numbers of requests.
OLD = 2048
# Numbers of requests that share a cell: exact up to this, then within a fifth.
EXACT_REQUESTS, BUCKETS_PER_DOUBLING = 8, 4
# Cells so near say what a step of plain decoding takes: two requests more or less, or a factor of 1.4.
NEAR = 2
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
    """The logarithm of a time at pace 1, from measurements of it."""

    __slots__ = ("at", "count", "last", "seen", "value")

    def __init__(self, known: list[float]) -> None:
        """Begin with what is `known` from its neighbours as if it had been measured: one wild step is not believed."""
        self.last, self.count, self.value = known, 0, 0.0
        # When it was last measured, in measurements of its number of requests and of the table.
        self.seen = self.at = 0

    def observe(self, steady: float, pace: Pace) -> None:
        """Take in the logarithm of a time at pace 1."""
        self.count += 1
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, steady - self.value))
        if self.count > FIRST:  # those before say nothing about the machine
            pace.follow(surprise * min(1.0, self.count / FEW))
        if self.count <= FEW:
            self.last = [*self.last[1 - FIRST :], steady]
            self.value = sorted(self.last)[(len(self.last) - 1) // 2]
        else:
            self.value += surprise / min(self.count - FEW + FIRST, CELL_MEMORY)


class CostTable:
    """Times by (requests, level), in seconds at pace 1; `prior[level]` is the shape before anything was measured."""

    def __init__(self, prior: Sequence[float], pace: Pace) -> None:
        self._prior, self._pace = list(prior), pace
        # Bucket → level → cell.
        self._cells: dict[int, dict[int, Cell]] = {}
        self.rate = PromptRate()
        self._curves: dict[int, list[float]] = {}
        self._unread = 0
        self._measured: dict[int, int] = {}
        self._total = 0

    def observe(self, requests: int, level: int, seconds: float, tokens: int = 0) -> None:
        """Take in a measured time of a step that also read so many prompt tokens; requests 0: it did nothing else."""
        bucket, steady = find_bucket(requests), max(seconds, 1e-7) * math.exp(-self._pace.log)
        self.rate.observe(bucket, level, tokens, steady)
        if not requests:
            return
        cell = self._cells.get(bucket, {}).get(level)
        expected = self.curve(requests)[level] if (tokens or cell is None) and not self.is_empty else 0.0
        steady = self._leave(steady, tokens, expected)
        if not steady:
            return
        if cell is None:
            known = [math.log(expected)] if expected else []
            cell = self._cells.setdefault(bucket, {}).setdefault(level, Cell(known))
        cell.observe(math.log(steady), self._pace)
        self._forget_stale(bucket, cell)
        self._unread += 1
        if cell.count <= FEW or self._unread >= READ_AGAIN:
            self._curves.clear()
            self._unread = 0

    def _forget_stale(self, bucket: int, measured: Cell) -> None:
        """Count a measurement of a bucket's cell, and forget those that have had none for long."""
        self._total += 1
        measured.at = self._total
        now = measured.seen = self._measured[bucket] = self._measured.get(bucket, 0) + 1
        if now % LOOKED_EVERY:
            return
        cells = self._cells[bucket]
        for level in [level for level, cell in cells.items() if now - cell.seen > STALE]:
            del cells[level]
            self._curves.clear()

    def _find_young(self, bucket: int) -> dict[int, Cell]:
        """Find the cells of a number of requests that were measured of late."""
        return {level: cell for level, cell in self._cells[bucket].items() if self._total - cell.at <= OLD}

    def _leave(self, steady: float, tokens: int, expected: float) -> float:
        """Return what prompts leave of a time, the nearer to what is expected the less it is; 0 if that is nothing."""
        if not tokens:
            return steady
        reading = tokens * self.rate.value
        share = expected / (expected + reading) if expected else 1 - reading / steady
        if not reading or share < LEAST_SHARE:
            return 0.0
        rest = max(steady - reading, steady * LEAST_SHARE / 4)
        return expected * (rest / expected) ** share if expected else rest

    def curve(self, requests: int) -> list[float]:
        """Return the time by level, for so many requests; never falling from level 1 on."""
        bucket = find_bucket(requests)
        curve = self._curves.get(bucket)
        if curve is None:
            curve = list(self._prior)
            # From the farthest number of requests to this one, each correcting what those before it say.
            for other in sorted(self._cells, key=lambda other: -abs(other - bucket))[-3:]:
                cells = self._cells[other] if other == bucket else self._find_young(other)
                curve = _correct(curve, cells) if cells else curve
            curve = self._curves[bucket] = [curve[0], *accumulate(curve[1:], max)]
        return curve

    def hope(self, requests: int, level: int) -> float:
        """Return the time at a level as it is if rows go on to cost what they do at the levels that were measured.

        What other numbers of requests say of it may be wrong, and is found out only where it is tried.
        """
        cells, curve = self._cells.get(find_bucket(requests), {}), self.curve(requests)
        known = [(at, time) for at, time in _smooth(cells) if 0 < at < level]
        if level in cells or len(known) < 2:
            return curve[level]
        (low, first), (high, last) = known[0], known[-1]
        return min(curve[level], last + (last - first) / (high - low) * (level - high))

    def count(self, requests: int, level: int) -> int:
        """Count the measurements of a cell."""
        cell = self._cells.get(find_bucket(requests), {}).get(level)
        return 0 if cell is None else cell.count

    def is_known_near(self, requests: int) -> bool:
        """Whether plain steps of about so many requests were measured often enough."""
        bucket = find_bucket(requests)
        near = (cells.get(0) for other, cells in self._cells.items() if abs(other - bucket) <= NEAR)
        return any(cell is not None and cell.count >= FIRST for cell in near)

    def knows(self, requests: int) -> bool:
        """Whether anything was measured for so many requests."""
        return find_bucket(requests) in self._cells

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


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step took: the target's seconds, and those of the drafter's pass behind it.

    The target's are over a row of each of `requests`, which decode, `drafted` more, and `prompt` prompt tokens; the
    drafter's for `width` tokens of each of `batch` requests (0: as many), with the context of those prompt tokens.
    """

    requests: int
    drafted: int
    target_s: float
    width: int = 0
    drafter_s: float = 0.0
    batch: int = 0
    prompt: int = 0


class StepCosts:
    """Both tables: the target's at level 0 (no drafts) to `width`, the drafter's at level 1 to `width`."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._pace = pace = Pace()
        self.verify = CostTable([1.0, *(VERIFY_FIRST + VERIFY_EACH * level for level in range(width))], pace)
        self.draft = CostTable([0.0, *(DRAFT_FIRST + DRAFT_EACH * level for level in range(width))], pace)

    def observe(self, step: Measured) -> None:
        """Take in what a step took."""
        level = max(1, round(step.drafted / step.requests)) if step.drafted and step.requests else 0
        self.verify.observe(step.requests, min(level, self.width), step.target_s, step.prompt)
        if step.width:
            self.draft.observe(step.batch or step.requests, step.width, step.drafter_s, step.prompt)

    def find_draft_curve(self, requests: int) -> list[float]:
        """Return the drafter's time by width; before it was measured in proportion to the target's."""
        curve = self.draft.curve(requests)
        if self.draft.is_empty:
            plain = self.verify.curve(requests)[0]
            curve = [plain * share for share in curve]
        return curve

    @property
    def pace(self) -> float:
        """How many times as long as at pace 1 everything takes now."""
        return math.exp(self._pace.log)
