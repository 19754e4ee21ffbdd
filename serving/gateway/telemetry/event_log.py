"""The gateway's own log: lines with time and level on stderr, and no flood of them in an outage."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

# Of lines of one kind, so many in full within this time; of the rest only how many there were.
FULL_LINES = 5
WINDOW_S = 10.0


LEVELS = {
    "laguna_serve": logging.INFO,
    "uvicorn": logging.ERROR,
    "asyncio": logging.ERROR,
    "python_multipart": logging.ERROR,  # warns of a form that cannot be read, which its sender learns
}


def set_up_logging() -> None:
    """Lines of this project, of the server and of the event loop on stderr; once per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_make_formatter("gateway"))
    for name, level in LEVELS.items():
        found = logging.getLogger(name)
        if not found.handlers:
            found.addHandler(handler)
            found.setLevel(level)


def name_process(name: str) -> None:
    """Let the lines of this process, where logging is set up, say which one it is."""
    for handler in logging.getLogger("laguna_serve").handlers:
        handler.setFormatter(_make_formatter(name))


def _make_formatter(name: str) -> logging.Formatter:
    formatter = logging.Formatter(f"%(asctime)s.%(msecs)03dZ %(levelname)s {name}: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


class BurstLog:
    """Writes lines to a logger, the first few of a kind in every window, then their number."""

    def __init__(self, logger: logging.Logger, window_s: float = WINDOW_S) -> None:
        self._logger, self._window_s = logger, window_s
        self._counts: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def write(self, kind: str, message: str, *arguments: object) -> None:
        """Write a line at level WARNING, or one more that is only counted. `kind` is of a bounded number of them."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= FULL_LINES:
            self._logger.warning(message, *arguments)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self.flush)

    def flush(self) -> None:
        """Say what was left out, and begin anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._counts = self._counts, {}
        for kind, count in counts.items():
            if count > FULL_LINES:
                self._logger.warning("%s: %d more in %g s", kind, count - FULL_LINES, self._window_s)
