"""Progress on stderr: a bar that is redrawn in place on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from laguna_serve.serving.kit.signals import check_signals
from laguna_serve.serving.machine.memory import GIB

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

T = TypeVar("T")
SPARSE_S = 10.0
# A bar is redrawn at most so often.
REDRAW_S = 0.1


def say(line: str) -> None:
    """Write a line for people at once, on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Which arm and step a phase is at, its rate so far and the time that is left."""

    def __init__(self, quiet: bool = False) -> None:
        self._output = _Output(quiet)
        self._phase_start = time.monotonic()

    def say(self, text: str) -> None:
        """Write one whole line, above a bar."""
        self._output.say(text)

    def begin(self) -> None:
        """Start a phase: the rates and times of `step` count from here."""
        self._output.close()
        self._phase_start = time.monotonic()

    def step(self, arm: str, done: int, total: int, tok_per_s: float | None = None) -> None:
        """Report that `done` of `total` steps (all arms together) are through."""
        if not self._output.is_due(is_last=done >= total):
            return
        left_s = (time.monotonic() - self._phase_start) / max(done, 1) * (total - done)
        rate = "" if tok_per_s is None else f" · {tok_per_s:.0f} tok/s"
        self._output.show(f"  {arm:<9} {done}/{total}{rate} · {left_s:.0f} s left", done, total)

    def track(self, arm: str, items: Sequence[T]) -> Iterator[T]:
        """Go through items as a phase of its own: a step is what is done with one of them."""
        self.begin()
        for done, item in enumerate(items, start=1):
            yield item
            self.step(arm, done, len(items))


class ByteProgress:
    """Counts bytes towards a total that is known at the start; `label` says what is being copied."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._begun_at = total, done, done
        self.label = ""
        self._output = _Output()
        self._started = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are through. Raises KeyboardInterrupt when the run was asked to stop."""
        check_signals()
        self.done += num_bytes
        if self._output.is_due(is_last=False):
            self._show()

    def finish(self) -> None:
        """Show the last line, whatever the time."""
        self._show()
        self._output.close()

    def say(self, text: str) -> None:
        """Write one whole line, above a bar."""
        self._output.say(text)

    def _show(self) -> None:
        rate = (self.done - self._begun_at) / max(time.monotonic() - self._started, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "…"
        share = f"{self.done / GIB:.2f} of {self.total / GIB:.2f} GiB"
        self._output.show(f"  {share} · {rate / GIB:.2f} GiB/s · {left} · {self.label}", self.done, self.total)


class _Output:
    """Where progress is shown. The last text of a bar stays on the screen."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._bar: RichProgress | None = None
        self._last_s = float("-inf") if self._is_terminal else time.monotonic()

    def is_due(self, *, is_last: bool) -> bool:
        now = time.monotonic()
        if self._quiet or (now - self._last_s < (REDRAW_S if self._is_terminal else SPARSE_S) and not is_last):
            return False
        self._last_s = now
        return True

    def show(self, text: str, done: int, total: int) -> None:
        if not self._is_terminal:
            say(text)
            return
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.start()
            atexit.register(self.close)  # the cursor is hidden until then
        (task,) = self._bar.task_ids or (self._bar.add_task(text),)
        self._bar.update(task, description=text, completed=done, total=total)
        self._bar.refresh()
        if done >= total:
            self.close()

    def say(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)


def _make_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    # Without a thread of its own, which would take time from what is measured.
    return RichProgress(
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
