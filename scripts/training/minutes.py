"""How long a training has taken: this run and those that were stopped before it, whose minutes lie beside their states.

A run that is killed, and does not end by itself, leaves none of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from laguna_serve.serving.kit.files import write_text

MINUTES = "minutes.txt"


@contextmanager
def count_minutes(
    file: Path, begun: Callable[[], bool], clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], float]]:
    """Give what tells the minutes so far; at the end of the block the file gets them, where anything was begun.

    Args:
        file: where earlier runs have left theirs.
        begun: whether there is what another run goes on with; a folder that was not begun stays as it is.
        clock: seconds.
    """
    started, earlier = clock(), 0.0
    with suppress(OSError, ValueError):
        earlier = float(file.read_text(encoding="utf-8"))

    def tell() -> float:
        return round(earlier + (clock() - started) / 60, 2)

    try:
        yield tell
    finally:
        if begun():
            with suppress(OSError):  # what ended the run is said, not this
                write_text(file, f"{tell()}\n")
