"""Many requests of every kind through the gateway, with faults, departures, updates of weights and reloads all along:
does each end as it must, and does the gateway stay as it was?

Two mock engines (relay/faulty_engine.py) fail to order. Checked of every request: its status, every byte of its events
and how it ends; at the end: nothing in flight, no socket more than at the start, and memory that does not grow. The
default is what an hour brings at 60 requests per second. The last stdout line is one JSON object (schema
laguna_serve.gateway_soak/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from laguna_serve.bench.gateway import KEY, run_child, write_config
from laguna_serve.bench.relay.faulty_engine import DONE, EVENTS
from laguna_serve.serving.engine import EngineError, find_port
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress

SCHEMA = "laguna_serve.gateway_soak/1"
WHOLE = b"".join(b'data: {"event": %d}\n\n' % index for index in range(EVENTS))
# How often each kind of request comes, of a hundred.
KINDS = {"stream": 50, "whole": 20, "leave": 10, "kill": 4, "truncate": 4, "garbage": 4, "reset": 4, "unknown": 4}
UPDATE_EVERY_S, SAMPLE_EVERY_S = 2.0, 1.0
# Resident memory of the last quarter against the second: more is growth.
MOST_GROWTH = 1.02
EXAMPLES = """
examples:
  python bench/soak.py --out out/soak
  python bench/soak.py --requests 5000 --out out/soak

exit status: 0 held, 1 a request ended otherwise than it must or something was left behind, 2 could not run,
130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("soak.py", lambda: measure(args))


def measure(args: argparse.Namespace) -> int:
    """Start gateway and engines, send the load, write what was found and print it. Returns the exit status."""
    out = Path(args.out)
    environment = describe_environment(current_argv())
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        engines = [find_port("127.0.0.1") for _ in range(2)]
        for port in engines:
            command = [sys.executable, "-m", "laguna_serve.bench.relay.faulty_engine", str(port)]
            stack.enter_context(run_child(command, port, out / "engine.log"))
        port, admin = find_port("127.0.0.1"), find_port("127.0.0.1")
        config = write_config(out, engines, admin)
        command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--config", str(config)]
        gateway = stack.enter_context(run_child([*command, "--port", str(port)], port, out / "gateway.log"))
        result = asyncio.run(Soak(port, admin, gateway, args, Progress()).run())
    result = {"schema": SCHEMA, "environment": environment, **result}
    write_json(out / "soak.json", result)
    write_text(out / "soak.md", render_markdown(result))
    line = {name: value for name, value in result.items() if name != "samples"}
    print_result(render_text(result), line, out, always_json=args.json)
    return FELL_SHORT if result["failures"] else HELD


class Soak:
    """One run against a gateway."""

    def __init__(
        self, port: int, admin: int, gateway: psutil.Process, args: argparse.Namespace, progress: Progress
    ) -> None:
        self._url, self._admin, self._gateway = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", gateway
        self._args, self._progress = args, progress
        self._random = random.Random(args.seed)
        self._done: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._samples: list[dict[str, float]] = []
        self._updates = self._reloads = 0

    async def run(self) -> dict[str, Any]:
        """All requests; what was found, JSON-ready."""
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
            await self._wait_ready(session)
            before = self._gateway.num_fds()
            self._progress.begin()
            beside = [asyncio.create_task(self._update(session)), asyncio.create_task(self._sample())]
            await asyncio.gather(*(self._work(session) for _ in range(self._args.streams)))
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            async with session.get(f"{self._admin}/admin/status") as response:
                status = await response.json()
        wall_s = time.monotonic() - started
        after = await self._settle(before)
        growth = self._find_growth()
        failures = [*self._wrong[:20]]
        if status["in_flight"]:
            failures.append(f"in flight at the end: expected 0, got {status['in_flight']}")
        if after > before:
            failures.append(f"open files at the end: expected at most {before}, got {after}")
        if growth is not None and growth > MOST_GROWTH:
            failures.append(f"memory: expected at most {MOST_GROWTH:.2f} of what it was, got {growth:.3f}")
        return {
            "requests": dict(self._done),
            "wrong": len(self._wrong),
            "wall_s": wall_s,
            "requests_per_s": sum(self._done.values()) / wall_s,
            "updates": self._updates,
            "reloads": self._reloads,
            "open_files": {"start": before, "end": after},
            "memory_growth": growth,
            "rss_mib": {"start": self._samples[0]["rss_mib"], "end": self._samples[-1]["rss_mib"]},
            "samples": self._samples,
            "failures": failures,
        }

    async def _work(self, session: aiohttp.ClientSession) -> None:
        total = self._args.requests
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
        wanted = {"unknown": 404, "reset": 502}.get(kind, 200)
        if response.status != wanted:
            return f"expected status {wanted}, got {response.status}: {answer[:200]!r}"
        if kind in ("unknown", "reset"):
            return None if b'"error"' in answer else f"expected an error, got {answer[:200]!r}"
        if kind == "whole":
            return check_version(json.loads(answer)["version"], response.headers)
        return check_stream(answer, whole=kind == "stream")

    async def _update(self, session: aiohttp.ClientSession) -> None:
        """New weights, and the configuration read again, alternately."""
        while True:
            await asyncio.sleep(UPDATE_EVERY_S)
            body = {"weight_version": f"v{self._updates}", "update": [{"names": []}]}
            async with session.post(f"{self._admin}/admin/update_weights", json=body) as response:
                if response.status != 200:
                    self._wrong.append(f"update: {(await response.text())[:200]}")
            self._updates += 1
            self._gateway.send_signal(signal.SIGHUP)
            self._reloads += 1

    async def _sample(self) -> None:
        started = time.monotonic()
        while True:
            rss_mib, files = self._gateway.memory_info().rss / 2**20, self._gateway.num_fds()
            self._samples.append({"s": time.monotonic() - started, "rss_mib": rss_mib, "files": files})
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
            if (found := self._gateway.num_fds()) <= before:
                break
            await asyncio.sleep(0.1)
        return found

    def _find_growth(self) -> float | None:
        """The last quarter's memory against the second's; None for a run too short to tell."""
        rss = [sample["rss_mib"] for sample in self._samples]
        if len(rss) < 20:
            return None
        quarter = len(rss) // 4
        return float(np.median(rss[-quarter:]) / np.median(rss[quarter : 2 * quarter]))


def check_stream(answer: bytes, *, whole: bool) -> str | None:
    """The events of a stream, complete or to the fault and then one error; what is wrong with them, if anything. Lines
    that tell of new weights may stand between events."""
    events = b"".join(part + b"\n\n" for part in answer.split(b"\n\n")[:-1] if not part.startswith(b": "))
    if whole:
        return None if events == WHOLE + DONE else f"expected all events, got {answer[-300:]!r}"
    seen, _, error = events.partition(b'data: {"error"')
    if not error.endswith(DONE) or not WHOLE.startswith(seen.split(b"data: \x00")[0]):
        return f"expected events and one error, got {answer[-300:]!r}"
    return None


def check_version(version: str, headers: Mapping[str, str]) -> str | None:
    """An answer's weights must be those that its header names (or one of them, over an update)."""
    told = headers["X-Weight-Version"].split(", ")
    return None if version in told else f"expected weights {told}, got {version}"


def render_text(result: Mapping[str, Any]) -> str:
    """For the terminal."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result["requests"].items())
    rss, files = result["rss_mib"], result["open_files"]
    growth = "" if result["memory_growth"] is None else f" (last quarter ÷ second: {result['memory_growth']:.3f})"
    lines = [
        f"{sum(result['requests'].values()):,} requests in {result['wall_s']:.0f} s: {kinds}",
        f"{result['updates']} updates of the weights, {result['reloads']} reloads",
        f"memory {rss['start']:.0f} → {rss['end']:.0f} MiB{growth}; open files {files['start']} → {files['end']}",
    ]
    return "\n".join([*lines, *(f"WRONG {failure}" for failure in result["failures"] or ())])


def render_markdown(result: Mapping[str, Any]) -> str:
    """As a page."""
    environment = result["environment"]
    verdict = "**Held**: every request ended as it must." if not result["failures"] else "**Fell short.**"
    told = f"`{environment['command']}` on {environment['cores']} cores of {environment['cpu']}, {environment['date']}."
    return "\n\n".join(["# The gateway's soak", verdict, *render_text(result).split("\n"), told]) + "\n"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/soak.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", metavar="N", type=int, default=216_000, help="in all (default: %(default)s)")
    parser.add_argument("--streams", metavar="N", type=int, default=32, help="at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of requests (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name in ("requests", "streams"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
