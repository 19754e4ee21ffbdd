"""A median with its quartiles: how figures of few rounds are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct


class Quartiles(Struct, frozen=True, kw_only=True):
    """A figure's median and quartiles over rounds."""

    median: float
    q25: float
    q75: float


def find_quartiles(values: Sequence[float] | npt.NDArray[np.float64]) -> Quartiles:
    """Find the quartiles of at least one value, between two of them by interpolation."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return Quartiles(median=float(middle), q25=float(low), q75=float(high))
