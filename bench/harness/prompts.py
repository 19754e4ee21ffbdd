"""Prompts for a benchmark: one JSON object per line with a "prompt" and, if wanted, an "id".

Bad input is refused before any engine starts, with the file and the line, because a benchmark over prompts that were
silently skipped or repeated answers another question than the one asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.errors import CommandError

SYNTHETIC_LINE = "def warm_up_{index}(value):\n    return value + {index}\n\n"


class PromptsError(CommandError, ValueError):
    """A prompts file that cannot be used; the message names the file and the line."""


def load_prompts(path: Path) -> list[Prompt]:
    """Read every prompt of a JSONL file, in order.

    Raises:
        PromptsError: the file is missing or empty, a line is not a JSON object, lacks a non-empty "prompt", or repeats
            an earlier prompt or id.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    except OSError as error:
        raise PromptsError(f"{path}: expected a prompts file, got {error.strerror}; check --prompts") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: expected UTF-8 text, got {error}; re-encode the file") from error
    prompts: list[Prompt] = []
    seen: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse_line(path, number, line)
        for key in (("prompt", prompt.text), ("id", prompt.id)):
            if (first := seen.setdefault(key, number)) != number:
                raise PromptsError(
                    f"{path}:{number}: expected distinct {key[0]}s, got the {key[0]} of line {first} again; remove one"
                )
        prompts.append(prompt)
    if not prompts:
        raise PromptsError(f'{path}: expected lines like {{"prompt": "…"}}, got an empty file; add prompts')
    return prompts


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}:{number}"
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptsError(
            f"{where}: expected one JSON object, got invalid JSON ({error.msg}); fix the line"
        ) from error
    if not isinstance(item, dict):
        raise PromptsError(f'{where}: expected an object with a "prompt", got a {type(item).__name__}; fix the line')
    text = item.get("prompt")
    if not isinstance(text, str) or not text:
        raise PromptsError(f'{where}: expected "prompt" to be a non-empty string, got {text!r}; fix the line')
    return Prompt(id=str(item.get("id", number)), text=text)


def split_prompts(prompts: Sequence[Prompt], timed: int | None, warmup: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into timed prompts (from the front) and warm-up prompts (from what is left, lengths spread evenly).

    Warm-up prompts are never among the timed ones; where the file has too few, synthetic ones of growing length help.

    Raises:
        PromptsError: more timed prompts are asked for than there are.
    """
    count = len(prompts) if timed is None else timed
    if count > len(prompts):
        raise PromptsError(f"--num-prompts: expected at most {len(prompts)}, got {count}; the file has no more prompts")
    spare = sorted(prompts[count:], key=lambda prompt: len(prompt.text))
    taken = min(warmup, len(spare))
    chosen = [spare[(index * len(spare)) // taken] for index in range(taken)]
    synthetic = [
        Prompt(id=f"warm-up-{index}", text=SYNTHETIC_LINE.format(index=index) * (2 + 4 * index))
        for index in range(warmup - taken)
    ]
    return list(prompts[:count]), chosen + synthetic
