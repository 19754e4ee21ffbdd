"""The `laguna` command.

Exit status of every subcommand: 0 it held, 1 it fell short, 2 it could not run (one line on stderr says why), 130 it
was interrupted; of `laguna serve` and `laguna gateway`, which Ctrl-C stops, 0 once they serve.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from laguna_serve.serving.commands import checkpoint_tools, doctor, gateway, keys, serve, traces
from laguna_serve.serving.kit.cli import Parser, choose_command, run_command
from laguna_serve.serving.kit.environment import read_versions

EPILOG = """examples:
  laguna doctor                                              (is everything in place? if not, what to do)
  laguna doctor tests/toy/teacher                            (what serving a model would take; starts nothing)
  laguna serve tests/toy/teacher --draft tests/toy/dflash    (http://127.0.0.1:8000/v1, until Ctrl-C)
  laguna gateway --example                                   (every setting of a gateway, and what it does)

`laguna COMMAND --help` has more.
"""
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "doctor": (doctor.main, "check the installation, or plan a model"),
    "serve": (serve.main, "serve a model over HTTP"),
    "gateway": (gateway.main, "one endpoint in front of engines"),
    "keys": (keys.main, "make, list and revoke keys of a gateway's clients"),
    "traces": (traces.main, "list, show and export what a gateway has recorded, in tokens"),
    "compact": (checkpoint_tools.compact, "make a smaller checkpoint from a pruning mask"),
    "unpad": (checkpoint_tools.unpad, "store a dense student without its padding"),
    "pad": (checkpoint_tools.pad, "give an unpadded dense student its stock layout back"),
    "quantise": (checkpoint_tools.quantise, "store a model in FP8 as released, or one in FP8 in plain numbers"),
    "drafter": (checkpoint_tools.drafter, "train a DFlash drafter, or turn one into the other published format"),
}


class ShowVersions(argparse.Action):
    """Prints what is installed, a package a line; read when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and end with 0."""
        print("\n".join(f"{name} {version}" for name, version in read_versions().items()))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand, which reads all that follows its name."""
    parser = Parser(prog="laguna", description="Serve Laguna models with vLLM.", epilog=EPILOG)
    parser.add_argument("--version", action=ShowVersions, nargs=0, help="print the versions installed here, and exit")
    chosen, rest = choose_command(parser, {name: text for name, (_, text) in COMMANDS.items()}, argv)
    command, _ = COMMANDS[chosen]
    return run_command("laguna", lambda: command(rest))


if __name__ == "__main__":
    sys.exit(main())
