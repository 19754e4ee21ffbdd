"""How much each arm drafted while it was asked, kept in a file, as a run may be continued with engines started anew.

An arm with a drafter that never drafts is plain decoding: comparing it with plain decoding says nothing.
"""

from __future__ import annotations

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

    @asynccontextmanager
    async def watch(self, session: aiohttp.ClientSession, arms: Sequence[Arm]) -> AsyncIterator[None]:
        """Count and file what these arms draft in the block, if it ends well."""
        before = [await _read_counters(session, arm) for arm in arms]
        yield
        for arm, earlier in zip(arms, before, strict=True):
            now = await _read_counters(session, arm)
            if earlier is not None and now is not None:
                delta = now.since(earlier)
                self._journal.append(Drafted(arm.name, delta.drafts, delta.accepted_tokens))

    def drafts(self, arm: str) -> int | None:
        """Drafts that were counted; None where nothing could be counted."""
        drafts = [stretch.drafts for stretch in self._journal.entries if stretch.arm == arm]
        return sum(drafts) if drafts else None

    def acceptance(self, arm: str) -> float | None:
        """Tokens per verification step, 1 + accepted ÷ drafts; None without drafts."""
        accepted = sum(stretch.accepted for stretch in self._journal.entries if stretch.arm == arm)
        return 1 + accepted / drafts if (drafts := self.drafts(arm)) else None


async def _read_counters(session: aiohttp.ClientSession, arm: Arm) -> Counters | None:
    """Read an arm's counters now; None where it shows none, as a gateway in front of the engine may not."""
    try:
        return await scrape_counters(session, arm.base_url)
    except EndpointError:
        return None
