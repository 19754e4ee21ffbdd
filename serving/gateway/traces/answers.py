"""Token ids and all that belongs to them, out of the body of a completion or chat, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from laguna_serve.serving.client.sse import DONE, list_payloads

# As the file of traces keeps them.
TokenIds = list[Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)]]


class AnswerError(ValueError):
    """A body that is no whole completion with token ids."""


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    """Completions have token_logprobs, chats a list of objects."""

    token_logprobs: list[float] | None = None
    content: list[_Logprob] | None = None


class _Given(msgspec.Struct):
    """A choice, or a part of one."""

    index: int = 0
    prompt_token_ids: TokenIds | None = None
    token_ids: TokenIds | None = None
    finish_reason: str | None = None
    routed_experts: str | None = None
    logprobs: _Logprobs | None = None


class _Metrics(msgspec.Struct):
    speculative_decoding: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    """An event of a stream, or a whole body. What is of another type than vLLM gives it is no answer."""

    error: Any = None
    prompt_token_ids: TokenIds | None = None
    choices: list[_Given] | None = None
    metrics: _Metrics | None = None


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
            if event.error is not None:
                raise AnswerError("an error in the place of an answer")
            prompt = event.prompt_token_ids or prompt
            if event.metrics is not None:
                speculation = event.metrics.speculative_decoding or speculation
            for given in event.choices or ():
                _add(choices.setdefault(given.index, Choice()), given)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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


def _add(choice: Choice, given: _Given) -> None:
    choice.prompt_token_ids = given.prompt_token_ids or choice.prompt_token_ids
    choice.token_ids += given.token_ids or ()
    choice.finish_reason = given.finish_reason or choice.finish_reason
    choice.routed_experts = given.routed_experts or choice.routed_experts
    if given.logprobs is not None:
        choice.logprobs += given.logprobs.token_logprobs or [one.logprob for one in given.logprobs.content or ()]


def _list_events(body: bytes) -> Iterator[_Event]:
    payloads = list_payloads(body)
    for payload in payloads:
        if payload != DONE:
            yield msgspec.json.decode(payload, type=_Event)
    if payloads != [body] and payloads[-1:] != [DONE]:
        raise AnswerError("a stream without its end")
