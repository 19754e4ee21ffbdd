"""Whether an engine has ended is asked without a lock that an interruption could leave taken."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from laguna_serve.serving.engine.engine import has_ended

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_interruption_while_it_is_asked_costs_nothing() -> None:
    """A KeyboardInterrupt between the two steps of subprocess's `poll` leaves its lock taken: `wait` waits on then."""
    with subprocess.Popen(SLEEP) as process:
        lock = process._waitpid_lock  # type: ignore[attr-defined]
        with lock:
            assert not has_ended(process)
            process.kill()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            end = time.monotonic() + 10
            while not has_ended(process):
                assert time.monotonic() < end
        assert process.wait(10) == -9, "its status is still there"
        assert has_ended(process)


def test_child_that_was_waited_for_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(10)
    assert has_ended(process)
