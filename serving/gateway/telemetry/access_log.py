"""One JSON object per request on stderr: who, what, where to, how long. Never a query, a header or a body."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from laguna_serve.serving.kit.results import JsonObject

# Lines are written together, away from the moment in which requests end and others begin.
WRITE_AFTER_S = 0.05


class AccessLog:
    """Writes lines to a stream, or nothing where there is none."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lines: list[JsonObject] = []
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def on_stderr(cls) -> AccessLog:
        return cls(sys.stderr)

    @property
    def enabled(self) -> bool:
        """False where nothing is written: records need not be made."""
        return self._stream is not None

    def write(self, line: JsonObject) -> None:
        """Write that a request has ended. The line is this log's from now on; its `time` is in seconds of the epoch."""
        if self._stream is None:
            return
        self._lines.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_AFTER_S, self.flush)

    def flush(self) -> None:
        """Write what has come together, in one go, so that lines of several processes do not mix."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        for line in lines:
            line["time"] = datetime.fromtimestamp(line["time"], UTC).isoformat(timespec="milliseconds")
        if self._stream is not None and lines:
            self._stream.write("".join(msgspec.json.encode(line).decode() + "\n" for line in lines))
            self._stream.flush()
