"""Teach a small model what a large one says, across tokenizers, as DANTE-Mosaic's page describes it.

Each command has its own --help; docs/dante.md has the formulas, and what is wrong on the page.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from laguna_serve.serving.kit.cli import Parser, choose_command

COMMANDS = {
    "cache": "ask a teacher for answers",
    "train": "teach a student what is in a cache",
    "ablate": "train without each part, and compare",
    "toy": "the whole of it at toy scale, with its bars",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; return the exit status."""
    chosen, rest = choose_command(Parser(prog="scripts/dante", description=__doc__), COMMANDS, argv)
    command = importlib.import_module(f"laguna_serve.scripts.dante.{chosen}")
    status: int = command.main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
