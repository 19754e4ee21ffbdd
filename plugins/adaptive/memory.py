"""What an engine has learned of steps and drafts, in a file: the next one of the same models begins with it.

Until it knows what a step costs, a policy tries; with many requests at once that is a few percent of an engine's first
minutes.  The launcher names the file by a variable, one for each pair of models, processor, vLLM and whatever else
decides what a step costs (serving/speculation/gamma_store.py).  What is read weighs as little as a cell's first
measurements: where it is wrong, it is soon corrected.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

logger = logging.getLogger(__name__)

VARIABLE = "LAGUNA_GAMMA_MEMORY"
# Seconds between two times that it is written while an engine works.
KEPT_EVERY_S = 60.0
# Nothing that was measured is beyond these; the logarithm of seconds.
Log = Annotated[float, Meta(ge=-30, le=10)]
Count = Annotated[int, Meta(ge=0, le=1 << 30)]
Sum = Annotated[float, Meta(ge=0, le=1e18)]


class CellMemory(msgspec.Struct, frozen=True, array_like=True):
    """A cell of a table of costs: the logarithm of its time at pace 1, from so many measurements."""

    bucket: Annotated[int, Meta(ge=1, le=256)]
    level: Annotated[int, Meta(ge=0, le=1024)]
    count: Annotated[int, Meta(ge=1)]
    value: Log


class RateMemory(msgspec.Struct, frozen=True, array_like=True):
    """Sums of squares and of products, whose quotient is a prompt token's seconds."""

    square: Sum
    product: Annotated[float, Meta(ge=-1e18, le=1e18)]


class TableMemory(msgspec.Struct, frozen=True):
    """A table of costs."""

    cells: list[CellMemory]
    rate: RateMemory


class KindMemory(msgspec.Struct, frozen=True):
    """What became of the drafts of requests of a kind: tries and successes by position."""

    kind: int
    tries: list[Sum]
    successes: list[Sum]


class PolicyMemory(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.gamma_memory/1"):
    """Everything that a policy for drafts of `width` tokens has learned."""

    width: int
    step: Count
    pace: Log
    verify: TableMemory
    draft: TableMemory
    kinds: list[KindMemory]
    prompts: Sum
    answers: Sum


class MemoryFile:
    """The file in which it is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept_at: float | None = None

    def read(self, width: int) -> PolicyMemory | None:
        """Read what an engine with drafts of this width left; None for nothing, or what cannot be read."""
        try:
            memory = msgspec.json.decode(self._path.read_bytes(), type=PolicyMemory)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("%s: expected what an engine has learned, got %s; it is learned anew", self._path, error)
            return None
        lists = [each for kind in memory.kinds for each in (kind.tries, kind.successes)]
        levels = [cell.level for table in (memory.verify, memory.draft) for cell in table.cells]
        if memory.width != width or any(len(each) != width for each in lists) or max(levels, default=0) > width:
            logger.warning("%s: expected drafts of %d tokens, got others; it is learned anew", self._path, width)
            return None
        return memory

    def is_due(self, now: float) -> bool:
        """Whether it is to be written again, by a clock in seconds; not at once after the start."""
        if self._kept_at is None:
            self._kept_at = now
        return now - self._kept_at >= KEPT_EVERY_S

    def write(self, memory: PolicyMemory, now: float) -> None:
        """Write it, whole or not at all; an engine goes on where the disk refuses."""
        self._kept_at = now
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(msgspec.json.encode(memory))
            partial.replace(self._path)
        except OSError as error:
            logger.warning("%s: what was learned of drafts is not kept: %s", self._path, error)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def open_memory() -> MemoryFile | None:
    """Open the file that the launcher has named; None where it has named none."""
    path = os.environ.get(VARIABLE)
    return MemoryFile(Path(path)) if path else None
