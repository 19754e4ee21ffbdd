"""How a benchmark command ends: its exit statuses, and one way in which it can be stopped."""

from __future__ import annotations

import signal

HELD, FELL_SHORT, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130


def stop_on_signals() -> None:
    """Make Ctrl-C and SIGTERM alike raise KeyboardInterrupt in the main thread.

    A shell starts background jobs with SIGINT ignored, and a program inherits that: it is undone here, as SIGTERM is
    passed on as SIGINT, the signal for which asyncio.run cancels its main task in good order.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
