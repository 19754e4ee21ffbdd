"""Prompts for a benchmark: one JSON object per line with a "prompt" or "messages" and, if wanted, an "id".

A line's "max_tokens" makes its answer shorter than `--max-tokens` does: answers of one length end together, and their
successors' prompts are read together, as those of users are not.

A "prompt" is continued as it stands. "messages" (with "tools" and "chat_template_kwargs", if wanted) go through the
model's own chat template, as users' requests do.

Bad input is refused before any engine starts, with the file and the line, because a benchmark over prompts that were
silently skipped or repeated answers another question than the one asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import UNSET, UnsetType

from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import number_lines
from laguna_serve.serving.kit.flags import Flag
from laguna_serve.serving.kit.results import JsonObject

SYNTHETIC_LINE = "def warm_up_{index}(value):\n    return value + {index}\n\n"
# So many lengths: hundreds of warm-up prompts must not grow out of a model's context.
SYNTHETIC_LENGTHS = 8


CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs")

Thinking = Literal["on", "off"]


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """A prompts file, and whether its prompts are continued or asked."""

    prompts: Annotated[
        Path, Flag('JSONL, one {"prompt": "…"} or {"messages": […]} per line', metavar="FILE", group="what to measure")
    ]
    chat: Annotated[bool, Flag("ask each prompt as a user's message, through the model's chat template")] = False
    thinking: Annotated[
        Thinking | None, Flag("what the chat template is given as enable_thinking (default: nothing)")
    ] = None

    def load_prompts(self, *, lengths: bool = True) -> list[Prompt]:
        """Read them. Without `lengths` all answers are to be of one length.

        Raises:
            PromptsError: the file cannot be used, or a line asks for a length of its own where none can have one.
        """
        prompts = load_prompts(self.prompts, self.chat, self.thinking)
        return prompts if lengths else _refuse_lengths(self.prompts, prompts)


class PromptsError(CommandError, ValueError):
    """A prompts file that cannot be used; the message names the file and the line."""


def load_texts(path: Path) -> list[Prompt]:
    """Read a file whose prompts must all be texts, whose answers are of one length.

    Raises:
        PromptsError: as `load_prompts`, or a line has messages, or a length of its own.
    """
    prompts = load_prompts(path)
    if (chat := next((prompt for prompt in prompts if prompt.chat is not None), None)) is not None:
        expected = 'expected a "prompt" on every line here, as texts are joined or continued'
        raise PromptsError(f"{path}: {expected}, got messages (id {chat.id}); give a file of texts")
    return _refuse_lengths(path, prompts)


def count_own_lengths(prompts: Sequence[Prompt], max_tokens: int) -> int:
    """Count the prompts whose answers are to be shorter than `max_tokens`."""
    return sum(prompt.max_tokens is not None and prompt.max_tokens < max_tokens for prompt in prompts)


def describe_load(prompts: int, max_tokens: int, own_lengths: int) -> str:
    """Describe in a few words how much was asked for."""
    return f"{prompts} prompts × {'up to ' if own_lengths else ''}{max_tokens} tokens"


def describe_rounds(waves: int | UnsetType, num_warmups: int | UnsetType) -> str:
    """Describe rounds of more prompts than are under way at once, and many untimed prompts; nothing where none are."""
    steady = "" if waves is UNSET else f", rounds of {waves} waves"
    return steady if num_warmups is UNSET else f"{steady}, after {num_warmups} untimed ones"


def fingerprint_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of everything that is sent of them."""
    sent = [[prompt.id, prompt.text, prompt.max_tokens] for prompt in prompts]
    return hashlib.sha256(json.dumps(sent).encode()).hexdigest()


def _refuse_lengths(path: Path, prompts: list[Prompt]) -> list[Prompt]:
    if (own := next((prompt for prompt in prompts if prompt.max_tokens is not None), None)) is not None:
        expected = 'expected no "max_tokens" on a line, as the command says how long answers are'
        raise PromptsError(f"{path}: {expected}, got {own.max_tokens} (id {own.id}); remove it")
    return prompts


def load_prompts(path: Path, chat: bool = False, thinking: Thinking | None = None) -> list[Prompt]:
    """Read every prompt of a JSONL file, in order. `chat`: a "prompt" becomes a user's message.

    Raises:
        PromptsError: the file is missing or empty, a line is not a JSON object, has neither a non-empty "prompt" nor
            "messages", or repeats an earlier prompt or id; or `thinking` is given and nothing goes through a template.
    """
    try:
        lines = list(number_lines(path))
    except OSError as error:
        raise PromptsError(f"{path}: expected a prompts file, got {error.strerror}; check --prompts") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: expected UTF-8 text, got {error}; re-encode the file") from error
    prompts: list[Prompt] = []
    seen: dict[tuple[str, str], int] = {}
    for number, line in lines:
        prompt = _parse_line(f"{path}:{number}", number, line, chat, thinking)
        for key in (("prompt", prompt.text), ("id", prompt.id)):
            if (first := seen.setdefault(key, number)) != number:
                raise PromptsError(
                    f"{path}:{number}: expected distinct {key[0]}s, got the {key[0]} of line {first} again; remove one"
                )
        prompts.append(prompt)
    if not prompts:
        raise PromptsError(f'{path}: expected lines like {{"prompt": "…"}}, got an empty file; add prompts')
    if thinking is not None and all(prompt.chat is None for prompt in prompts):
        raise PromptsError(f"--thinking: expected messages in {path}, or --chat, got texts to continue; add --chat")
    return prompts


def _parse_line(where: str, number: int, line: str, chat: bool, thinking: Thinking | None) -> Prompt:
    try:
        item = json.loads(line)
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair, {error.object[error.start]!r}"
        raise PromptsError(f"{where}: expected text that UTF-8 can write, got {got}; fix the line") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is no JSONDecodeError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise PromptsError(f"{where}: expected one JSON object, got invalid JSON ({reason}); fix the line") from error
    if not isinstance(item, dict):
        raise PromptsError(f'{where}: expected an object with a "prompt", got a {type(item).__name__}; fix the line')
    label = str(number if item.get("id") is None else item["id"])
    most = item.get("max_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise PromptsError(f'{where}: expected "max_tokens" to be a number from 1 on, got {most!r}; fix the line')
    if "messages" in item:
        if "prompt" in item:
            raise PromptsError(f'{where}: expected a "prompt" or "messages", got both; remove one')
        return _make_chat(label, _check_chat(where, item), thinking, most)
    text = item.get("prompt")
    if not isinstance(text, str) or not text:
        raise PromptsError(f'{where}: expected "prompt" to be a non-empty string, got {text!r}; fix the line')
    if chat:
        return _make_chat(label, {"messages": [{"role": "user", "content": text}]}, thinking, most)
    return Prompt(id=label, text=text, max_tokens=most)


def _check_chat(where: str, item: JsonObject) -> JsonObject:
    messages = item["messages"]
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        expected = 'expected "messages" to be a list of {"role": "…", "content": "…"}'
        raise PromptsError(f"{where}: {expected}, got {json.dumps(messages)[:80]}; fix the line")
    kwargs = item.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise PromptsError(f'{where}: expected "chat_template_kwargs" to be an object, got {kwargs!r}; fix the line')
    return {name: item[name] for name in CHAT_FIELDS if name in item}


def _make_chat(label: str, chat: JsonObject, thinking: Thinking | None, most: int | None) -> Prompt:
    if thinking is not None:
        kwargs = chat.get("chat_template_kwargs", {}) | {"enable_thinking": thinking == "on"}
        chat = chat | {"chat_template_kwargs": kwargs}
    return Prompt(id=label, text=json.dumps(chat, ensure_ascii=False), chat=chat, max_tokens=most)


def split_prompts(prompts: Sequence[Prompt], timed: int | None, warmup: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into timed prompts (from the front) and warm-up prompts (from what is left, lengths spread evenly).

    Warm-up prompts are in the file's order and never among the timed ones; where it has too few, synthetic ones of
    several lengths help.

    Raises:
        PromptsError: more timed prompts are asked for than there are.
    """
    count = len(prompts) if timed is None else timed
    if count > len(prompts):
        raise PromptsError(f"--num-prompts: expected at most {len(prompts)}, got {count}; the file has no more prompts")
    spare = sorted(range(count, len(prompts)), key=lambda index: len(prompts[index].text))
    taken = min(warmup, len(spare))
    chosen = [prompts[at] for at in sorted(spare[(index * len(spare)) // taken] for index in range(taken))]
    synthetic = [
        Prompt(id=f"warm-up-{index}", text=SYNTHETIC_LINE.format(index=index) * (2 + 4 * (index % SYNTHETIC_LENGTHS)))
        for index in range(warmup - taken)
    ]
    return list(prompts[:count]), chosen + synthetic
