"""The subcommands that make checkpoints, which live in scripts/checkpoints and scripts/training.

They need torch, and are imported when their flags have been read, so that `--help` is there at once. The one place
where serving reaches up (tests/test_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from laguna_serve.serving.kit.cli import Parser, choose_command


def compact(argv: Sequence[str]) -> int:
    """`laguna compact`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints.options import read_compact

    given = read_compact(argv)
    from laguna_serve.scripts.checkpoints import compact

    return compact.execute(*given)


def unpad(argv: Sequence[str]) -> int:
    """`laguna unpad`. Returns the exit status."""
    return _store_widths(argv, "unpad")


def pad(argv: Sequence[str]) -> int:
    """`laguna pad`. Returns the exit status."""
    return _store_widths(argv, "pad")


def quantise(argv: Sequence[str]) -> int:
    """`laguna quantise`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints.options import read_quantise

    given = read_quantise(argv)
    from laguna_serve.scripts.checkpoints import quantise

    return quantise.execute(*given)


def drafter(argv: Sequence[str]) -> int:
    """`laguna drafter`: one tool of several. Returns the exit status."""
    parser = Parser(prog="laguna drafter", description="Tools for DFlash drafters.")
    tools = {"train": "make or continue a drafter for a model", "convert": "turn a drafter into the other format"}
    tool, rest = choose_command(parser, tools, argv)
    if tool == "convert":
        from laguna_serve.scripts.checkpoints.options import read_convert

        given = read_convert(rest)
        from laguna_serve.scripts.checkpoints import drafter

        return drafter.execute(*given)
    from laguna_serve.scripts.training.drafter import command

    return command.main(rest)


def _store_widths(argv: Sequence[str], tool: Literal["unpad", "pad"]) -> int:
    from laguna_serve.scripts.checkpoints.options import read_widths

    given = read_widths(argv, tool)
    from laguna_serve.scripts.checkpoints import unpad

    return unpad.execute(*given, tool)
