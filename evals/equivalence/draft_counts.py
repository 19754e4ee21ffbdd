"""How much each arm drafted while it was asked, kept in a file, as a run may be continued with engines started anew.

An arm with a drafter that never drafts is plain decoding: comparing it with plain decoding says nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from laguna_serve.bench.harness.arms import Arm
from laguna_serve.serving.client.counters import Counters, scrape_counters
from laguna_serve.serving.client.errors import EndpointError


class DraftCounts:
    """Drafts and accepted tokens per arm, summed over every stretch of asking that came to its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._drafts: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError):  # cut off in writing
                self._count(**json.loads(line))

    @asynccontextmanager
    async def watch(self, session: aiohttp.ClientSession, arms: Sequence[Arm]) -> AsyncIterator[None]:
        """Count and file what these arms draft in the block, if it ends well."""
        before = [await _read_counters(session, arm) for arm in arms]
        yield
        for arm, earlier in zip(arms, before, strict=True):
            now = await _read_counters(session, arm)
            if earlier is not None and now is not None:
                self._add(arm.name, now.since(earlier))

    def drafts(self, arm: str) -> int | None:
        """Drafts that were counted; None where nothing could be counted."""
        return self._drafts.get(arm)

    def acceptance(self, arm: str) -> float | None:
        """Tokens per verification step, 1 + accepted ÷ drafts; None without drafts."""
        return 1 + self._accepted[arm] / self._drafts[arm] if self._drafts[arm] else None

    def _add(self, arm: str, moved: Counters) -> None:
        found = {"arm": arm, "drafts": moved.drafts, "accepted": moved.accepted_tokens}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        self._count(arm, moved.drafts, moved.accepted_tokens)

    def _count(self, arm: str, drafts: int, accepted: int) -> None:
        self._drafts[arm] += drafts
        self._accepted[arm] += accepted


async def _read_counters(session: aiohttp.ClientSession, arm: Arm) -> Counters | None:
    """An arm's counters now; None where it shows none, as a gateway in front of the engine may not."""
    try:
        return await scrape_counters(session, arm.base_url)
    except EndpointError:
        return None
