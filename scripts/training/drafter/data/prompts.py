"""Prompts whose continuations the target is to generate: JSON Lines, made token ids by the target's own tokenizer.

{"prompt": "def f("}                                  text to continue
{"prompt": [1, 17, 4]}                                the same as token ids
{"messages": [{"role": "user", "content": "…"}]}      a conversation, with "tools" and "chat_template_kwargs" if any
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laguna_serve.scripts.training.drafter.data.records import Prompt
from laguna_serve.serving.kit.errors import CommandError, first_line
from laguna_serve.serving.kit.files import explain_read, is_whole, number_lines
from laguna_serve.serving.kit.results import JsonObject


class PromptsError(CommandError):
    """A file that holds no prompts; one line that names the file's line."""


def read_prompts(path: Path, tokenizer: Any, vocabulary: int) -> list[Prompt]:
    """Read every different prompt, in the file's order.

    Raises:
        PromptsError: a line is no prompt, or has a token that the target does not have.
    """
    try:
        lines = list(number_lines(path))
    except (OSError, UnicodeError) as error:
        raise PromptsError(f"{path}: expected JSON Lines of prompts, {explain_read(error)}") from None
    prompts: dict[Prompt, None] = {}
    for number, line in lines:
        prompt = _encode(f"{path}:{number}", line, tokenizer)
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocabulary:
            expected = f"tokens from 0 to {vocabulary - 1}, the target's vocabulary"
            raise PromptsError(f"{path}:{number}: expected {expected}, got {_show(prompt)}; is it for this model?")
        prompts[prompt] = None
    return list(prompts)


def _encode(place: str, line: str, tokenizer: Any) -> Prompt:
    expected = 'expected an object with "prompt" (text or token ids) or "messages"'
    try:
        record: JsonObject = json.loads(line)
        if not is_whole(json.dumps(record, ensure_ascii=False)):
            raise ValueError("half a surrogate pair")
        prompt = record.get("prompt")
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return tuple(prompt)
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt, verbose=False)["input_ids"])
        messages = record["messages"]
    except (ValueError, KeyError, AttributeError):
        raise PromptsError(f"{place}: {expected}, got {line[:40]}; fix it") from None
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=record.get("tools"),
            add_generation_prompt=True,
            return_dict=False,
            **(record.get("chat_template_kwargs") or {}),
        )
    except Exception as error:
        reason = first_line(error)
        raise PromptsError(f"{place}: expected messages that the chat template takes, got: {reason}") from None
    return tuple(ids)


def _show(prompt: Prompt) -> str:
    return f"{min(prompt)} to {max(prompt)}" if prompt else "none"
