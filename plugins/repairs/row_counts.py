"""Numbers of rows that come again: for each one that is new oneDNN makes its products anew; pure.

It takes milliseconds, of a small model as much as half of a step, and under a load of prompts most numbers are new.
"""

from __future__ import annotations

# Up to so many rows none are added; then to a multiple of 16, and of 32 beyond COARSE, which wastes a twelfth at most.
EXACT, STEP, COARSE = 64, 16, 256


def pad(rows: int) -> int:
    """Return how many rows so many are padded to."""
    if rows <= EXACT:
        return rows
    step = STEP if rows <= COARSE else 2 * STEP
    return -(-rows // step) * step
