"""Write long prompts made of a repository's own text as JSON Lines, for benchmarks: {"id": …, "prompt": …}.

A prompt holds files, each under its path, the last one cut, and ends with a question about that one, so that it reads
as what a coding agent sends. It has as many tokens as asked for, give or take a half per cent, by the model's own
tokenizer, beside what a chat template adds. Prompts of one length begin at different files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from tokenizers import Tokenizer

from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_TEXT, BoundedConfig, Flag
from laguna_serve.serving.kit.run_dir import check_out_file

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = frozenset((".py", ".md", ".sh", ".toml", ".cpp", ".hpp", ".c", ".h", ".js", ".ts", ".go", ".rs", ".java"))
LARGEST_BYTES = 1 << 20
QUESTION = "\nWhat does {path} do, and what would you change in it first? Answer with a short patch.\n"
EXAMPLES = """examples:
  python scripts/long_prompts.py --model tests/toy/teacher --tokens 512,1500 --count 8 --out out/long.jsonl
  python scripts/long_prompts.py --model poolside/Laguna-XS.2 --tokens 4096,32768,100000 --out out/long.jsonl
  python bench/ab.py --model M --draft D --prompts out/long.jsonl --chat --stop-at-eos --out out/long

exit status: 0 written, 2 it could not run
"""


@dataclass(frozen=True, kw_only=True)
class LongPromptsConfig(BoundedConfig):
    """How long, how many, of which text and by whose tokenizer."""

    model: Annotated[str, Flag("checkpoint whose tokenizer counts, folder or hub id in the cache", metavar="M")]
    tokens: Annotated[tuple[int, ...], Flag("lengths of prompts", metavar="N,…", at_least=64, at_most=MOST_TEXT)] = (
        4096,
        32768,
        100_000,
    )
    count: Annotated[int, Flag("prompts of each length (default: 8)", metavar="N", at_least=1)] = 8
    text: Annotated[Path, Flag("repository whose files are taken (default: this one)", metavar="DIR")] = ROOT
    seed: Annotated[int, Flag("of the files' order (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("JSON Lines", metavar="FILE")]


class LongPromptsResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.long_prompts/1"
):
    """The file, and how many tokens each prompt in it has."""

    out: str
    tokens: dict[str, int]


class LongPromptsError(CommandError, ValueError):
    """Prompts that cannot be made of what is there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/long_prompts.py", LongPromptsConfig, __doc__, EXAMPLES)
    return command.run(argv, write_long_prompts)


def write_long_prompts(config: LongPromptsConfig) -> LongPromptsResult:
    """Write them.

    Raises:
        CheckpointError, LongPromptsError: there is no tokenizer, or no text.
        RunDirError, WriteError: the file cannot be written.
    """
    tokenizer = open_tokenizer(config.model)
    files = list_files(config.text)
    check_out_file(config.out)
    lines, counts = [], {}
    for length in config.tokens:
        for number in range(config.count):
            order = random.Random(f"{config.seed}/{length}/{number}").sample(files, len(files))
            prompt = make_prompt(order, config.text, tokenizer, length)
            name = f"{length}-{number}"
            counts[name] = count_tokens(tokenizer, prompt)
            lines.append(json.dumps({"id": name, "prompt": prompt}, ensure_ascii=False) + "\n")
    write_text(config.out, "".join(lines))
    return LongPromptsResult(out=str(config.out), tokens=counts)


def open_tokenizer(model: str) -> Tokenizer:
    """Open the checkpoint's tokenizer.json.

    Raises:
        CheckpointError: the model is not on this machine, or has none that can be read.
    """
    folder = find_folder(model)
    if folder is None:
        raise CheckpointError(f"{model}: expected a model on this machine, got a hub id that is not in the cache")
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder}/tokenizer.json: expected a fast tokenizer, got {error}") from error


def list_files(root: Path) -> list[Path]:
    """Source and documents under a folder that a person wrote: nothing hidden, nothing very large.

    Raises:
        LongPromptsError: there are none.
    """
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in SUFFIXES
        and not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(root).parts)
        and path.is_file()
        and 0 < path.stat().st_size < LARGEST_BYTES
    ]
    if not found:
        raise LongPromptsError(f"{root}: expected a folder with source files, got none; pass --text")
    return found


def make_prompt(files: Sequence[Path], root: Path, tokenizer: Tokenizer, length: int) -> str:
    """Files in order until there are so many tokens; the last one is cut, and asked about.

    Raises:
        LongPromptsError: all files together are shorter.
    """
    text, tokens = "", 0
    for path in files:
        body = f"# {path.relative_to(root)}\n{path.read_text(encoding='utf-8', errors='replace')}\n"
        question = QUESTION.format(path=path.relative_to(root))
        encoding = tokenizer.encode(body, add_special_tokens=False)
        room = length - tokens - count_tokens(tokenizer, question)
        if len(encoding.ids) >= room:
            return text + body[: encoding.offsets[room - 1][1] if room > 0 else 0] + question
        text += body
        tokens += len(encoding.ids)
    raise LongPromptsError(f"{root}: expected text for {length} tokens, got {tokens}; lower --tokens or pass --text")


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text, without any that a model begins with."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    raise SystemExit(main())
