"""Ctrl-C and SIGTERM: at once, or where it is safe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_received: list[int] = []
_holds = 0


def interrupt_on_signals(*, hangup: bool = False) -> None:
    """Make Ctrl-C and SIGTERM alike raise KeyboardInterrupt in the main thread; with `hangup` SIGHUP, too.

    A shell starts background jobs with SIGINT ignored, and a program inherits that: it is undone here, as SIGTERM is
    passed on as SIGINT, the signal for which asyncio.run cancels its main task in good order. SIGHUP stays ignored
    under nohup.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if hangup and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer SIGINT and SIGTERM: they make `check_signals` raise KeyboardInterrupt, for as long as this lasts.

    Then the handlers are as before. A second signal raises at once.

    An exception that a signal handler raises in the midst of a library's own code can be swallowed there or come out
    as another one (seen with safetensors), so the handler only takes note.
    """
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    _received.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_signals() -> None:
    """Raise KeyboardInterrupt once a signal has come, unless it is held."""
    if _received and not _holds:
        raise KeyboardInterrupt


@contextmanager
def hold_signals() -> Iterator[None]:
    """Inside `defer_signals`: let `check_signals` pass for as long as this lasts, for what is to be done as a whole."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


def _note(number: int, _frame: Any) -> None:
    _received.append(number)
    if len(_received) > 1:
        raise KeyboardInterrupt
