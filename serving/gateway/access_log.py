"""One JSON object per request on stderr: who, what, where to, how long. Never a query, a header or a body."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO


class AccessLog:
    """Writes lines to a stream, or nothing where there is none."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    @classmethod
    def on_stderr(cls) -> AccessLog:
        """The usual place."""
        return cls(sys.stderr)

    @property
    def enabled(self) -> bool:
        """Is anything written?"""
        return self._stream is not None

    def write(self, about: Mapping[str, str | int | None], started_s: float, first_s: float | None) -> None:
        """A request has ended; times are of `time.perf_counter()`."""
        if self._stream is None:
            return
        now = time.perf_counter()
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **about,
            "ttft_ms": None if first_s is None else round((first_s - started_s) * 1e3, 2),
            "total_ms": round((now - started_s) * 1e3, 2),
        }
        # One write per line, so that lines of several processes do not mix; the stream buffers nothing.
        self._stream.write(json.dumps(line, ensure_ascii=True) + "\n")
        self._stream.flush()
