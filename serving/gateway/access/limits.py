"""Limits that come back with time: a bucket that fills through the minute, and a budget of one day."""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86_400
ROUNDING = 1e-6


class Bucket:
    """A token bucket. What is taken may be more than there is, once it is known; it comes back first then."""

    __slots__ = ("_per_second", "filled_s", "left", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self.left, self.filled_s = per_minute, float(per_minute), now
        self._per_second = per_minute / 60

    def refill(self, now: float) -> None:
        """Give what has come back until `now`, in seconds of the same clock as before."""
        if now != self.filled_s:
            left = self.left + (now - self.filled_s) * self._per_second
            self.left, self.filled_s = (left if left < self.per_minute else float(self.per_minute)), now

    def has(self, amount: float) -> bool:
        """Whether there is so much; of more than a minute has, whether it is full."""
        return self.left >= (amount if amount < self.per_minute else self.per_minute) - ROUNDING

    def find_wait_s(self, amount: float) -> int:
        """After how many whole seconds there will be so much, at least 1."""
        missing = min(amount, self.per_minute) - self.left
        return max(1, math.ceil(missing * 60 / self.per_minute - ROUNDING))

    def take(self, amount: float) -> None:
        """Take so much, or give back what is negative; there is never more than a minute has."""
        left = self.left - amount
        self.left = left if left < self.per_minute else float(self.per_minute)

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.left) / self._per_second if self.left < self.per_minute else 0.0


@dataclass(slots=True)
class Budget:
    """Tokens of one day (UTC, counted from the epoch): what is used, and what requests in flight may come to use.

    What is in flight counts for the day on which it ends.
    """

    day: int = 0
    used: int = 0
    reserved: int = 0

    def has(self, amount: int, limit: int) -> bool:
        """Whether so much is left of the limit; of more than a day has, whether nothing is taken."""
        return self.used + self.reserved + min(amount, limit) <= limit


def find_midnight_s(now: float) -> int:
    """Find how many seconds it is to the next midnight UTC, at least 1."""
    return max(1, math.ceil(DAY_S - now % DAY_S))
