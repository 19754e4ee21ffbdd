"""The ``laguna`` command.

Exit status of every subcommand: 0 it held, 1 it fell short, 2 it could not run (one line on stderr says why).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.commands import checkpoint_tools, doctor, gateway, serve
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.cli import Parser

EPILOG = """examples:
  laguna doctor
  laguna serve tests/toy/teacher --draft tests/toy/dflash

`laguna COMMAND --help` has more.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = Parser(prog="laguna", description="Serve Laguna models with vLLM.", epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (doctor, serve, gateway, checkpoint_tools):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.  What follows a bare ``--`` is left for vLLM."""
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    args = build_parser().parse_args(given[:split])
    args.extra_args = given[split + 1 :]
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (CheckpointError, EngineError, doctor.DoctorError) as error:
        print(f"laguna: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("laguna: error: interrupted", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
