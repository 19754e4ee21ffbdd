"""What the checkpoint tools behind `laguna` share: exit statuses, errors in one line, and one way to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from laguna_serve.plugins.padding import PaddingError
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.files.stopping import stop_on_signals
from laguna_serve.serving.checkpoint import CheckpointError

HELD, FELL_SHORT, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Keeps the examples' line breaks, and says an error in one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Without the usage that argparse puts before it."""
        self.exit(COULD_NOT_RUN, f"laguna: error: {message}; see `{self.prog} --help`\n")


def run_tool(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, interrupted: str) -> int:
    """The tool's exit status; bad input is one line on stderr, and so is an interruption, with what becomes of it."""
    try:
        with stop_on_signals():
            return run(args)
    except (CheckpointError, PaddingError, PruningError) as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print(f"laguna: interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
