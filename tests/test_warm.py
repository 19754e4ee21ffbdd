"""The warm process of tests outlives whoever is interrupted while asking it."""

from __future__ import annotations

import time

import psutil
import pytest
from warm import start_warm
from warm.client import Warm

pytestmark = pytest.mark.vllm


def raise_interrupt(_warm: Warm) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_question_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`laguna serve` gets its Ctrl-C while it waits for its engine, and asks again."""
    ended, running = start_warm("import sys\nsys.exit(7)\n"), start_warm("import time\ntime.sleep(60)\n")
    deadline = time.monotonic() + 30
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Warm, "_read", raise_interrupt)
        for process in (ended, running):
            with pytest.raises(KeyboardInterrupt):
                process.poll()
    assert (ended.wait(30), running.poll()) == (7, None)
    running.kill()
    assert running.wait(30) == -9
