"""Many things at a time: the order, and a word where none of them ends."""

from __future__ import annotations

import asyncio

import pytest

from laguna_serve.serving.client import closed_loop
from laguna_serve.serving.client.closed_loop import run_closed_loop


def test_an_endpoint_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests give up after ten minutes, and are repeated: nothing was said for half an hour."""
    monkeypatch.setattr(closed_loop, "QUIET_S", 1e-3)
    said: list[str] = []

    async def run() -> None:
        told = asyncio.Event()

        def say(line: str) -> None:
            said.append(line)
            if len(said) == 2:
                told.set()

        async def work(_: int) -> None:
            await told.wait()

        await run_closed_loop(range(3), 2, work, say)

    asyncio.run(run())
    assert said[0] == "no answer for 0 s; 2 requests in flight"


def test_what_ends_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    async def work(item: int) -> None:
        done.append(item)

    asyncio.run(run_closed_loop(range(5), 2, work))
    assert (sorted(done), capsys.readouterr().err) == ([0, 1, 2, 3, 4], "")
