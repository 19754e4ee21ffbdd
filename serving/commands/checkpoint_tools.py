"""The subcommands that make checkpoints, which live in scripts/checkpoints and scripts/training.

They need torch, and are imported when they are called. The one place where serving reaches up (tests/test_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.serving.kit.cli import Parser


def compact(argv: Sequence[str]) -> int:
    """`laguna compact`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints import compact

    return compact.main(argv)


def unpad(argv: Sequence[str]) -> int:
    """`laguna unpad`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints import unpad

    return unpad.main(argv)


def pad(argv: Sequence[str]) -> int:
    """`laguna pad`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints import unpad

    return unpad.main(argv, tool="pad")


def quantise(argv: Sequence[str]) -> int:
    """`laguna quantise`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints import quantise

    return quantise.main(argv)


def drafter(argv: Sequence[str]) -> int:
    """`laguna drafter`: one tool of several. Returns the exit status."""
    parser = Parser(prog="laguna drafter", description="Tools for DFlash drafters.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="COMMAND")
    commands.add_parser("train", help="make or continue a drafter for a model", add_help=False)
    commands.add_parser("convert", help="turn a drafter into the other format", add_help=False)
    if parser.parse_args(argv[:1]).COMMAND == "convert":
        from laguna_serve.scripts.checkpoints import drafter

        return drafter.main(argv[1:])
    from laguna_serve.scripts.training.drafter import command

    return command.main(argv[1:])
