"""Answers in OpenAI's two forms, whole and as events, with the fields that vLLM gives."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from laguna_serve.plugins.diffusion.server.bodies import Body, ChatBody
from laguna_serve.plugins.diffusion.server.errors import ApiError
from laguna_serve.plugins.diffusion.server.generation import Generation, Piece

DONE = "data: [DONE]\n\n"


@dataclass(slots=True)
class Form:
    """How one request is answered: as a completion or as a chat.

    Attributes:
        prompts: tokens of each choice's prompt.
        counted: tokens of all prompts, each once.
    """

    body: Body
    model: str
    prompts: Sequence[Sequence[int]]
    counted: int
    ident: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.ident = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(16)}"

    @property
    def is_chat(self) -> bool:
        """Whether a chat is answered."""
        return isinstance(self.body, ChatBody)

    def render_whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Render the whole answer."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        listed = [self._render_choice(choice) for choice in choices]
        return {**self._head(kind), "choices": listed, "usage": self._count(sum(c.total for c in choices))}

    def _render_choice(self, choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": choice.text}}
        end = {"logprobs": None, "finish_reason": choice.reason, "stop_reason": choice.stopped_by}
        rendered = {"index": choice.index, **said, **end}
        if self.body.return_token_ids:
            rendered |= {"token_ids": choice.ids, "prompt_token_ids": list(self.prompts[choice.index])}
        return rendered

    def begin_events(self) -> list[str]:
        """Write the events before the first piece: a chat's choices say whose they are."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._format([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], 0)
            for index in range(len(self.prompts))
        ]

    def format_piece(self, piece: Piece, total: int) -> str:
        """Write a piece as an event; `total`: tokens of all choices so far."""
        said: dict[str, Any] = {"delta": {"content": piece.text}} if self.is_chat else {"text": piece.text}
        choice: dict[str, Any] = {"index": piece.index, **said, "logprobs": None, "finish_reason": piece.reason}
        if piece.reason is not None:
            choice["stop_reason"] = piece.stopped_by
        if self.body.return_token_ids:
            choice["token_ids"] = list(piece.ids)
        return self._format([choice], total)

    def end_events(self, total: int) -> list[str]:
        """Write the events after the last piece."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return [DONE]
        return [_format_event({**self._chunk([]), "usage": self._count(total)}), DONE]

    def _format(self, choices: list[dict[str, Any]], total: int) -> str:
        options, chunk = self.body.stream_options, self._chunk(choices)
        if options is not None and options.include_usage:
            chunk["usage"] = self._count(total) if options.continuous_usage_stats else None
        return _format_event(chunk)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.is_chat else "text_completion"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.ident, "object": kind, "created": self.created, "model": self.model}

    def _count(self, completion: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.counted,
            "completion_tokens": completion,
            "total_tokens": self.counted + completion,
        }


@dataclass(slots=True)
class Choice:
    """A choice as it grows."""

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    total: int = 0
    reason: str | None = None
    stopped_by: str | int | None = None

    def add(self, piece: Piece) -> None:
        """Take in what is new of it."""
        self.text += piece.text
        self.ids += piece.ids
        self.total, self.reason, self.stopped_by = piece.total, piece.reason, piece.stopped_by


async def answer_whole(form: Form, generation: Generation) -> dict[str, Any]:
    """Wait for all choices.  Raises ApiError when the engine fails at one of them."""
    choices = [Choice(index) for index in range(len(form.prompts))]
    async for piece in generation.pieces():
        choices[piece.index].add(piece)
    return form.render_whole(choices)


async def answer_events(form: Form, generation: Generation) -> AsyncIterator[str]:
    """Give the events of a stream as the choices grow; a failure is its last but one."""
    totals = [0] * len(form.prompts)
    for event in form.begin_events():
        yield event
    try:
        async for piece in generation.pieces():
            totals[piece.index] = piece.total
            yield form.format_piece(piece, sum(totals))
    except ApiError as error:
        yield error.format_event()
        yield DONE
        return
    for event in form.end_events(sum(totals)):
        yield event


class EventResponse(StreamingResponse):
    """A stream of events; however it ends, the generation does with it."""

    def __init__(self, form: Form, generation: Generation) -> None:
        super().__init__(answer_events(form, generation), media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or stop where the client leaves."""
        with self._generation:
            await super().__call__(scope, receive, send)


def _format_event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
