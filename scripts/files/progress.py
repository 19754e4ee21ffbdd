"""Progress of a copy on stderr: bytes, rate, time left; one line that updates on a terminal, else one now and then."""

from __future__ import annotations

import shutil
import sys
import time

from laguna_serve.scripts.files.stopping import check

GIB = 2**30
UPDATE_S, SPARSE_S = 0.2, 5.0


class Progress:
    """Counts bytes towards a total that is known at the start."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._begun_at = total, done, done
        self._tty = sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._open_line = False
        self.label = ""

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are through.  Raises KeyboardInterrupt when the run was asked to stop."""
        check()
        self.done += num_bytes
        now = time.monotonic()
        if now - self._last >= (UPDATE_S if self._tty else SPARSE_S):
            self._last = now
            self._show(now)

    def finish(self) -> None:
        """The last line, whatever the time."""
        self._show(time.monotonic())
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False

    def say(self, text: str) -> None:
        """One whole line."""
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _show(self, now: float) -> None:
        rate = (self.done - self._begun_at) / max(now - self._started, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "…"
        share = f"{self.done / GIB:.2f} of {self.total / GIB:.2f} GiB"
        text = f"  {share} · {rate / GIB:.2f} GiB/s · {left} · {self.label}"
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + text[:width].ljust(width))
            self._open_line = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
