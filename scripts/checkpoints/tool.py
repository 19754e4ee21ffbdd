"""What the tools that make checkpoints share: where they write, how they end and what they print."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from laguna_serve.plugins.formats.experts import ExpertFormatError
from laguna_serve.plugins.layers import PaddingError
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.serving.kit.cli import run_command
from laguna_serve.serving.kit.signals import defer_signals


def run_tool(body: Callable[[], int], interrupted: str) -> int:
    """Run a tool; its exit status.

    Bad input is one line on stderr, and so is an interruption, with what becomes of it.
    """

    def run() -> int:
        with defer_signals():
            return body()

    return run_command("laguna", run, others=(ExpertFormatError, PaddingError, PruningError), interrupted=interrupted)


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Format named figures, a line for each."""
    return "\n".join(f"{name:<15} {text}" for name, text in rows)
