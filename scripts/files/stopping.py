"""Ctrl-C and SIGTERM, obeyed where it is safe: between two tensors.

An exception that a signal handler raises in the midst of a library's own code can be swallowed there or come out as
another one (seen with safetensors), so the handler only takes note.  A second signal ends the run at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_asked: list[int] = []


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """While this lasts, SIGINT and SIGTERM make `check` raise KeyboardInterrupt; then the handlers are as before."""
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    _asked.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises KeyboardInterrupt once a signal has come."""
    if _asked:
        raise KeyboardInterrupt


def _note(number: int, _frame: Any) -> None:
    _asked.append(number)
    if len(_asked) > 1:
        raise KeyboardInterrupt
