"""Write the toy family's text as JSON Lines, a module of Python's standard library in each: {"id": …, "text": …}.

By default the held-out modules, which neither training nor calibration saw: what to measure a loss on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.scripts.text import corpus
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import Flag

EXAMPLES = """examples:
  python scripts/toy_text.py --out held-out.jsonl
  python scripts/toy_text.py --training --out training.jsonl

exit status: 0 written, 2 it could not run
"""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which half of the text, and where to."""

    training: Annotated[bool, Flag("the modules that it was trained on instead")] = False
    out: Annotated[Path, Flag("JSON Lines", metavar="FILE")]


class TextResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.toy_text/1"):
    """The file, and how many modules are in it."""

    out: str
    documents: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/toy_text.py", TextConfig, __doc__, EXAMPLES)
    return command.run(argv, write_toy_text)


def write_toy_text(config: TextConfig) -> TextResult:
    """Write it.

    Raises:
        CommandError: the file cannot be written.
    """
    modules = [module for module in corpus.read_modules() if module.held_out != config.training]
    lines = [json.dumps({"id": module.name, "text": module.text}, ensure_ascii=False) for module in modules]
    try:
        config.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        expected = f"expected a file to write, got {error.strerror}"
        raise CommandError(f"{config.out}: {expected}; check --out") from None
    return TextResult(out=str(config.out), documents=len(modules))


if __name__ == "__main__":
    sys.exit(main())
