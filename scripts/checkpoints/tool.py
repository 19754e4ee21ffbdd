"""How the checkpoint tools behind `laguna` end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from laguna_serve.plugins.padding import PaddingError
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.cli import COULD_NOT_RUN, INTERRUPTED
from laguna_serve.serving.kit.signals import defer_signals


def run_tool(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, interrupted: str) -> int:
    """The tool's exit status; bad input is one line on stderr, and so is an interruption, with what becomes of it."""
    try:
        with defer_signals():
            return run(args)
    except (CheckpointError, PaddingError, PruningError) as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print(f"laguna: interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
