"""How much each arm drafted while it was asked, kept in a file, as a run may be continued with engines started anew.

An arm with a drafter that never drafts is plain decoding: comparing it with plain decoding says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec

from laguna_serve.bench.arms.arms import Arm
from laguna_serve.serving.client.counters import Counters, scrape_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.journal import Journal


class Drafted(msgspec.Struct, frozen=True):
    """What an arm drafted in one stretch of asking, a line of the file."""

    arm: str
    drafts: int
    accepted: int


class DraftCounts:
    """Drafts and accepted tokens per arm, summed over every stretch of asking that came to its end."""

    def __init__(self, path: Path) -> None:
        """Read those that are there. Raises JournalError."""
        self._journal = Journal(path, Drafted)
        self._drafts: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        for stretch in self._journal.entries:
            self._count(stretch)

    @asynccontextmanager
    async def watch(self, session: aiohttp.ClientSession, arms: Sequence[Arm]) -> AsyncIterator[None]:
        """Count and file what these arms draft in the block, if it ends well."""
        before = [await _read_counters(session, arm) for arm in arms]
        yield
        for arm, earlier in zip(arms, before, strict=True):
            now = await _read_counters(session, arm)
            if earlier is not None and now is not None:
                delta = now.since(earlier)
                stretch = Drafted(arm.name, delta.drafts, delta.accepted_tokens)
                self._journal.append(stretch)
                self._count(stretch)

    def drafts(self, arm: str) -> int | None:
        """Drafts that were counted; None where nothing could be counted."""
        return self._drafts.get(arm)

    def acceptance(self, arm: str) -> float | None:
        """Tokens per verification step, 1 + accepted ÷ drafts; None without drafts."""
        return 1 + self._accepted[arm] / self._drafts[arm] if self._drafts[arm] else None

    def _count(self, stretch: Drafted) -> None:
        self._drafts[stretch.arm] += stretch.drafts
        self._accepted[stretch.arm] += stretch.accepted


async def _read_counters(session: aiohttp.ClientSession, arm: Arm) -> Counters | None:
    """Read an arm's counters now; None where it shows none, as a gateway in front of the engine may not."""
    try:
        return await scrape_counters(session, arm.base_url)
    except EndpointError:
        return None
