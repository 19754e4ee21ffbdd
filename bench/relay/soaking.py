"""One soak of the gateway: requests of every kind, updates and reloads beside them, and what must hold of each.

Two mock engines (faulty_engine.py) fail to order. Checked of every request: its status, every byte of its events and
how it ends; at the end: nothing in flight, no socket more than at the start, and memory that does not grow.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping

import aiohttp
import numpy as np
import psutil

from laguna_serve.bench.relay.faulty_engine import DONE, EVENTS
from laguna_serve.bench.relay.options import SoakConfig
from laguna_serve.bench.relay.processes import KEY
from laguna_serve.bench.relay.result import ProcessSample, SoakResult, StartEnd
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress

WHOLE = b"".join(b'data: {"event": %d}\n\n' % index for index in range(EVENTS))
# How often each kind of request comes, of a hundred.
KINDS = {"stream": 50, "whole": 20, "leave": 10, "kill": 4, "truncate": 4, "garbage": 4, "reset": 4, "unknown": 4}
UPDATE_EVERY_S, SAMPLE_EVERY_S = 2.0, 1.0
# Resident memory of the last quarter against the second: more is growth.
MOST_GROWTH = 1.02
# Of requests that ended wrongly, so many are named.
MOST_LISTED = 20


class Soak:
    """One run against a gateway."""

    def __init__(self, port: int, admin: int, gateway: psutil.Process, config: SoakConfig, progress: Progress) -> None:
        self._url, self._admin, self._gateway = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", gateway
        self._config, self._progress = config, progress
        self._random = random.Random(config.seed)
        self._done: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._samples: list[ProcessSample] = []
        self._updates = self._reloads = 0

    async def run(self, environment: Environment) -> SoakResult:
        """All requests; then what became of them and of the gateway."""
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
            await self._wait_ready(session)
            before = self._gateway.num_fds()
            self._progress.begin()
            beside = [asyncio.create_task(self._update(session)), asyncio.create_task(self._sample())]
            await asyncio.gather(*(self._work(session) for _ in range(self._config.streams)))
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            async with session.get(f"{self._admin}/admin/status") as response:
                status = await response.json()
        wall_s = time.monotonic() - started
        after, growth = await self._settle(before), self._find_growth()
        return SoakResult(
            environment=environment,
            requests=dict(self._done),
            wrong=len(self._wrong),
            wall_s=wall_s,
            requests_per_s=sum(self._done.values()) / wall_s,
            updates=self._updates,
            reloads=self._reloads,
            open_files=StartEnd(start=before, end=after),
            memory_growth=growth,
            rss_mib=StartEnd(start=self._samples[0].rss_mib, end=self._samples[-1].rss_mib),
            samples=self._samples,
            failures=[*self._wrong[:MOST_LISTED], *find_leftovers(status["in_flight"], before, after, growth)],
        )

    async def _work(self, session: aiohttp.ClientSession) -> None:
        total = self._config.requests
        while (done := sum(self._done.values())) < total:
            kind = self._random.choices([*KINDS], [*KINDS.values()])[0]
            self._done[kind] += 1
            self._progress.step("requests", done + 1, total)
            try:
                reason = await self._ask(session, kind)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                self._wrong.append(f"{kind}: {reason}")

    async def _ask(self, session: aiohttp.ClientSession, kind: str) -> str | None:
        """One request; what was wrong with its end, if anything."""
        mode = {"leave": "slow", "unknown": "whole"}.get(kind, kind)
        body = json.dumps({"model": "none" if kind == "unknown" else "fake", "mode": mode, "prompt": "x" * 500})
        session_id = {"X-Session-ID": str(self._random.randrange(100))}
        async with session.post(f"{self._url}/v1/completions", data=body, headers=session_id) as response:
            if kind == "leave":
                await response.content.readany()
                response.close()
                return None
            answer = await response.read()
        expected = {"unknown": 404, "reset": 502}.get(kind, 200)
        if response.status != expected:
            return f"expected status {expected}, got {response.status}: {answer[:200]!r}"
        if kind in ("unknown", "reset"):
            return None if b'"error"' in answer else f"expected an error, got {answer[:200]!r}"
        if kind == "whole":
            return check_version(json.loads(answer)["version"], response.headers)
        return check_stream(answer, whole=kind == "stream")

    async def _update(self, session: aiohttp.ClientSession) -> None:
        """Give new weights, and read the configuration again, alternately."""
        while True:
            await asyncio.sleep(UPDATE_EVERY_S)
            body = {"weight_version": f"v{self._updates}", "update": [{"names": []}]}
            async with session.post(f"{self._admin}/admin/update_weights", json=body) as response:
                if response.status != 200:
                    self._wrong.append(f"update: {(await response.text(errors='replace'))[:200]}")
            self._updates += 1
            self._gateway.send_signal(signal.SIGHUP)
            self._reloads += 1

    async def _sample(self) -> None:
        started = time.monotonic()
        while True:
            rss_mib, files = self._gateway.memory_info().rss / 2**20, self._gateway.num_fds()
            self._samples.append(ProcessSample(seconds=time.monotonic() - started, rss_mib=rss_mib, files=files))
            await asyncio.sleep(SAMPLE_EVERY_S)

    async def _wait_ready(self, session: aiohttp.ClientSession) -> None:
        for _ in range(100):
            async with session.get(f"{self._url}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.1)
        raise EngineError("gateway: expected it to be ready, got 503 for 10 s")

    async def _settle(self, before: int) -> int:
        """Open files once idle connections have been closed: the last are aiohttp's to engines, after 15 s."""
        for _ in range(200):
            if (files := self._gateway.num_fds()) <= before:
                break
            await asyncio.sleep(0.1)
        return files

    def _find_growth(self) -> float | None:
        """Hold the last quarter's memory against the second's; None for a run too short."""
        rss = [sample.rss_mib for sample in self._samples]
        if len(rss) < 20:
            return None
        quarter = len(rss) // 4
        return float(np.median(rss[-quarter:]) / np.median(rss[quarter : 2 * quarter]))


def find_leftovers(in_flight: int, before: int, after: int, growth: float | None) -> list[str]:
    """Find what the gateway kept that it must not: requests in flight, open files, memory."""
    left = []
    if in_flight:
        left.append(f"in flight at the end: expected 0, got {in_flight}")
    if after > before:
        left.append(f"open files at the end: expected at most {before}, got {after}")
    if growth is not None and growth > MOST_GROWTH:
        left.append(f"memory: expected at most {MOST_GROWTH:.2f} of what it was, got {growth:.3f}")
    return left


def check_stream(answer: bytes, *, whole: bool) -> str | None:
    """Say what is wrong with a stream's events, or None: complete, or to the fault and then one error.

    Lines that announce new weights may stand between events.
    """
    events = b"".join(part + b"\n\n" for part in answer.split(b"\n\n")[:-1] if not part.startswith(b": "))
    if whole:
        return None if events == WHOLE + DONE else f"expected all events, got {answer[-300:]!r}"
    seen, _, error = events.partition(b'data: {"error"')
    if not error.endswith(DONE) or not WHOLE.startswith(seen.split(b"data: \x00")[0]):
        return f"expected events and one error, got {answer[-300:]!r}"
    return None


def check_version(version: str, headers: Mapping[str, str]) -> str | None:
    """Check that an answer's weights are those that its header names (or one of them, over an update)."""
    named = headers["X-Weight-Version"].split(", ")
    return None if version in named else f"expected weights {named}, got {version}"
