"""Subcommands that are programs of their own: they need torch, which the serving side never imports."""

from __future__ import annotations

import argparse
import os
import sys

TOOLS = {
    "compact": "make a smaller checkpoint from a pruning mask",
    "unpad": "store a dense student without its padding",
    "pad": "give an unpadded dense student its stock layout back",
    "drafter": "turn a DFlash drafter into the other published format",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds every tool.  All that follows its name is left to the tool, `--help` too: here nothing begins a flag."""
    for name, text in TOOLS.items():
        parser = commands.add_parser(name, help=text, prefix_chars="\0", add_help=False)
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.set_defaults(run=run, tool=name)


def run(args: argparse.Namespace) -> int:
    """Becomes the tool: the same process, so that signals and the exit status are its own."""
    module = f"laguna_serve.scripts.checkpoints.{args.tool}"
    arguments = [*args.arguments, *(["--", *args.extra_args] if args.extra_args else [])]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
