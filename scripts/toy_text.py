"""Write the toy family's text as JSON Lines, a module of Python's standard library in each: {"id": …, "text": …}.

By default the held-out modules, which neither training nor calibration saw: what to measure a loss on. With --prompts
the beginnings of definitions in them instead, {"id": …, "prompt": …}: what `laguna drafter train --prompts` takes.
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
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag
from laguna_serve.serving.kit.run_dir import check_out_file

EXAMPLES = """examples:
  python scripts/toy_text.py --out held-out.jsonl
  python scripts/toy_text.py --training --out training.jsonl
  python scripts/toy_text.py --training --prompts 400 --out prompts.jsonl

exit status: 0 written, 2 it could not run
"""


@dataclass(frozen=True, kw_only=True)
class TextConfig(BoundedConfig):
    """Which half of the text, and where to."""

    training: Annotated[bool, Flag("the modules that it was trained on instead")] = False
    prompts: Annotated[int | None, Flag("so many prompts, none twice", metavar="N")] = None
    seed: Annotated[int, Flag("draws the prompts", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("JSON Lines", metavar="FILE")]


class TextResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.toy_text/1"):
    """The file, and how many lines are in it: modules, or prompts."""

    out: str
    documents: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/toy_text.py", TextConfig, __doc__, EXAMPLES)
    return command.run(argv, write_toy_text)


def write_toy_text(config: TextConfig) -> TextResult:
    """Write it.

    Raises:
        CommandError, RunDirError, WriteError: there are not so many prompts, or the file cannot be written.
    """
    modules = [module for module in corpus.read_modules() if module.held_out != config.training]
    if config.prompts is None:
        documents = [{"id": module.name, "text": module.text} for module in modules]
    else:
        documents = corpus.cuts(modules, max(0, config.prompts), config.seed)
        if config.prompts < 1 or len(documents) < config.prompts:
            most = f" to {len(documents)}, as many as there are" if documents else " or more"
            raise CommandError(f"--prompts: expected 1{most}, got {config.prompts}")
    check_out_file(config.out)
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    write_text(config.out, "\n".join(lines) + "\n")
    return TextResult(out=str(config.out), documents=len(documents))


if __name__ == "__main__":
    sys.exit(main())
