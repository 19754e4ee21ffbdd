"""What a checkpoint's files say about chatting: generation_config.json, chat template, the tokenizer's vocabulary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laguna_serve.serving.chat.template import Abilities, probe_template, read_object, read_template
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.kit.results import JsonObject

# What the poolside_v1 reasoning parser looks up, and refuses to start without.
REASONING_TOKENS = ("<assistant>", "<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Release:
    """What a checkpoint's files say about chatting.

    Attributes:
        name: for messages.
        abilities: of its chat template; None without a template.
        tool_call_parser, reasoning_parser, template_kwargs: as named by generation_config.json.
        missing_tokens: of REASONING_TOKENS, those that the tokenizer does not have.
    """

    name: str
    abilities: Abilities | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    missing_tokens: tuple[str, ...] = ()


def read_release(folder: Path, tokenizer: Path, chat_template: str | None = None) -> Release:
    """Read the model's generation_config.json, and the chat template and vocabulary beside its tokenizer.

    Args:
        folder: of the model.
        tokenizer: of the tokenizer, mostly the same.
        chat_template: what replaces the template: a file, or a template itself, as vLLM's --chat-template.
    Raises:
        CheckpointError: one of the files is not what it should be.
    """
    template = read_template(tokenizer) if chat_template is None else read_given_template(chat_template)
    path = folder / "generation_config.json"
    generation = read_object(path)
    for key in ("tool_call_parser", "reasoning_parser"):
        if not isinstance(generation.get(key), str | None):
            raise CheckpointError(f"{path}: expected {key} to be a name, got {generation[key]!r}; fetch it again")
    kwargs = generation.get("default_chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        what = f"expected default_chat_template_kwargs to be an object, got {kwargs!r}"
        raise CheckpointError(f"{path}: {what}; fetch it again")
    return Release(
        name=str(folder),
        abilities=None if template is None else probe_template(template),
        tool_call_parser=generation.get("tool_call_parser"),
        reasoning_parser=generation.get("reasoning_parser"),
        template_kwargs=kwargs,
        missing_tokens=_find_missing_tokens(tokenizer),
    )


def read_given_template(given: str) -> str:
    """Read the template in a file, or the text itself if it is one (vLLM: it holds a brace or a line break)."""
    try:
        return expand(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"expected a file of UTF-8, got other bytes ({error.reason})"
        raise CheckpointError(f"chat template {given}: {what}; check the path") from None
    except OSError as error:
        if any(mark in given for mark in "{}\n"):
            return given
        what = f"expected a template file, got {error.strerror}"
        raise CheckpointError(f"chat template {given}: {what}; check the path") from None


def assume_release(hub_id: str) -> Release:
    """Assume what a hub id that is not here can do: Poolside's own Laguna models all have tools and thinking.

    Of S-2.1 it is on where nobody says otherwise.
    """
    owner, _, name = hub_id.lower().partition("/")
    if owner != "poolside" or not name.startswith("laguna") or "base" in name:
        return Release(hub_id, None)
    kwargs: JsonObject = {"enable_thinking": True} if name.startswith("laguna-s-2.1") else {}
    return Release(hub_id, Abilities(tools=True, thinking=True), template_kwargs=kwargs)


def _find_missing_tokens(folder: Path) -> tuple[str, ...]:
    """Find which of REASONING_TOKENS are missing; none without a tokenizer.json, as vLLM has other ways to read one."""
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return ()
    tokenizer = read_object(path)
    added = {entry.get("content") for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)}
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = vocabulary if isinstance(vocabulary, dict) else {}
    return tuple(token for token in REASONING_TOKENS if token not in added and token not in known)
