"""The subcommands that make checkpoints, which live in scripts/checkpoints.

They need torch, and are imported when they are called. The one place where serving reaches up (tests/test_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence


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
    """`laguna drafter`. Returns the exit status."""
    from laguna_serve.scripts.checkpoints import drafter

    return drafter.main(argv)
