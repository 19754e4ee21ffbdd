"""Token ids and all that belongs to them, out of the body of a completion or chat, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from laguna_serve.serving.client.sse import DONE, SseParser


class AnswerError(ValueError):
    """A body that is no whole completion with token ids."""


@dataclass(slots=True)
class Choice:
    """One of a request's answers.

    Attributes:
        logprobs: of the tokens, nats, where the client asked for them.
        routed_experts: as the engine gave them, where it did.
    """

    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    routed_experts: str | None = None


@dataclass(slots=True)
class Answer:
    """The choices of a body, in order, and what vLLM says of its drafts."""

    choices: list[Choice]
    speculation: dict[str, Any] | None = None


def read_answer(body: bytes) -> Answer:
    """Read a body. Raises AnswerError: it is an error, cut off, or without token ids."""
    choices: dict[int, Choice] = {}
    prompt: list[int] = []
    speculation = None
    try:
        for event in _list_events(body):
            if event.get("error") is not None:
                raise AnswerError("an error in the place of an answer")
            prompt = event.get("prompt_token_ids") or prompt
            speculation = (event.get("metrics") or {}).get("speculative_decoding") or speculation
            for given in event.get("choices") or ():
                _add(choices.setdefault(given.get("index", 0), Choice()), given)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as error:
        raise AnswerError(f"no completion: {error}") from None
    found = [choices[index] for index in sorted(choices)]
    for choice in found:
        choice.prompt_token_ids = choice.prompt_token_ids or prompt
        if not (choice.prompt_token_ids and choice.token_ids):
            raise AnswerError("no token ids: ask with return_token_ids")
        if choice.logprobs and len(choice.logprobs) != len(choice.token_ids):
            raise AnswerError("not as many log-probabilities as tokens")
    if not found:
        raise AnswerError("no choices")
    return Answer(found, speculation)


def _add(choice: Choice, given: dict[str, Any]) -> None:
    choice.prompt_token_ids = given.get("prompt_token_ids") or choice.prompt_token_ids
    choice.token_ids += given.get("token_ids") or ()
    choice.finish_reason = given.get("finish_reason") or choice.finish_reason
    choice.routed_experts = given.get("routed_experts") or choice.routed_experts
    logprobs = given.get("logprobs") or {}
    # Completions have token_logprobs, chats a list of objects.
    choice.logprobs += logprobs.get("token_logprobs") or [one["logprob"] for one in logprobs.get("content") or ()]


def _list_events(body: bytes) -> Iterator[dict[str, Any]]:
    if not body.lstrip().startswith((b"data:", b":", b"event:")):
        yield msgspec.json.decode(body)
        return
    done = False
    for payload in SseParser().feed(body):
        done = payload == DONE
        if not done:
            yield msgspec.json.decode(payload)
    if not done:
        raise AnswerError("a stream without its end")
