"""Progress on stderr: one line that updates on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

SPARSE_S = 10.0


class Progress:
    """Says which arm and prompt a phase is at, its rate so far and the time that is left."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._open_line = False
        self._phase_start = self._last = 0.0

    def say(self, text: str) -> None:
        """One whole line."""
        if self._quiet:
            return
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def begin(self) -> None:
        """Start a phase: the rates and times of `step` count from here."""
        self._phase_start = time.monotonic()
        self._last = self._phase_start

    def step(self, arm: str, done: int, total: int, tok_per_s: float | None = None) -> None:
        """Report that `done` of `total` prompts (all arms together) are through."""
        now = time.monotonic()
        last_one = done >= total
        if self._quiet or (not self._tty and now - self._last < SPARSE_S and not last_one):
            return
        self._last = now
        left_s = (now - self._phase_start) / max(done, 1) * (total - done)
        rate = "" if tok_per_s is None else f" · {tok_per_s:.0f} tok/s"
        text = f"  {arm:<9} {done}/{total}{rate} · {left_s:.0f} s left"
        if not self._tty:
            sys.stderr.write(text + "\n")
        else:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + text[:width].ljust(width))
            self._open_line = not last_one
            if last_one:
                sys.stderr.write("\n")
        sys.stderr.flush()
