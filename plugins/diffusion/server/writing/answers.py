"""Answers in OpenAI's two forms, whole and as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood
from laguna_serve.plugins.diffusion.server.bodies import Body, ChatBody
from laguna_serve.plugins.diffusion.server.errors import ApiError
from laguna_serve.plugins.diffusion.server.generation import Generation, Piece
from laguna_serve.plugins.diffusion.server.writing.forms import (
    AnswerForm,
    ChatLogprobs,
    ChoiceForm,
    CompletionLogprobs,
    Said,
    Usage,
)
from laguna_serve.plugins.diffusion.server.writing.logprobs import LogprobWriter

DONE = "data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """A choice as it grows."""

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    total: int = 0
    reason: str | None = None
    stopped_by: str | int | None = None
    likelihoods: list[Likelihood] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take in what is new of it."""
        self.text += piece.text
        self.ids += piece.ids
        self.likelihoods += piece.likelihoods
        self.total, self.reason, self.stopped_by = piece.total, piece.reason, piece.stopped_by


@dataclass(slots=True)
class Writer:
    """Writes the answer to one request: to a completion or to a chat.

    Attributes:
        logprobs: writes those of the answer's tokens.
        prompts: of the choices.
        counted: tokens of all prompts, each once.
    """

    body: Body
    model: str
    logprobs: LogprobWriter
    prompts: Sequence[Sequence[int]]
    counted: int
    ident: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)
    _prompted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ident = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(16)}"

    @property
    def is_chat(self) -> bool:
        """Whether a chat is answered."""
        return isinstance(self.body, ChatBody)

    def write_whole(self, choices: Sequence[Choice]) -> str:
        """Write the whole answer."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        answer = self._make(kind, [self._make_whole(choice) for choice in choices])
        answer.usage = self._count(sum(choice.total for choice in choices))
        if self.is_chat and self.body.return_token_ids:
            answer.prompt_token_ids = list(self.prompts[0])
        return answer.model_dump_json(exclude_unset=True)

    def _make_whole(self, choice: Choice) -> ChoiceForm:
        form = self._make_choice(choice.index, choice.reason)
        form.stop_reason = choice.stopped_by
        form.logprobs = self._write_logprobs(choice)
        if self.is_chat:
            form.message = Said(role="assistant", content=choice.text)
        else:
            form.text = choice.text
        if self.body.return_token_ids:
            form.token_ids = choice.ids
            self._add_prompt(form)
        return form

    def _add_prompt(self, form: ChoiceForm) -> None:
        """Add the prompt's ids to a completion's choice, once, where vLLM has them; a chat's are beside its choices."""
        if not self.is_chat and form.index not in self._prompted:
            form.prompt_token_ids = list(self.prompts[form.index])
            self._prompted.add(form.index)

    def begin_events(self) -> list[str]:
        """Write the events before the first piece: a chat's choices say whose they are."""
        if not self.is_chat:
            return []
        forms = [self._make_choice(index, None) for index in range(len(self.prompts))]
        for form in forms:
            form.delta = Said(role="assistant", content="")
        first = list(self.prompts[0]) if self.body.return_token_ids else None
        return [self._write_event([form], 0, prompt=None if form.index else first) for form in forms]

    def write_piece(self, piece: Piece, total: int) -> str:
        """Write a piece as an event; `total`: tokens of all choices so far."""
        form = self._make_choice(piece.index, piece.reason)
        form.logprobs = self._write_logprobs(piece)
        if self.is_chat:
            form.delta = Said(content=piece.text)
        else:
            form.text = piece.text
        if piece.reason is not None:
            form.stop_reason = piece.stopped_by
        if self.body.return_token_ids:
            form.token_ids = list(piece.ids)
            self._add_prompt(form)
        return self._write_event([form], total)

    def end_events(self, total: int) -> list[str]:
        """Write the events after the last piece."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return [DONE]
        return [self._write_event([], total, last=True), DONE]

    def _write_logprobs(self, new: Choice | Piece) -> CompletionLogprobs | ChatLogprobs | None:
        """Write those of new tokens of a choice; null for an event without any, as without the wish for them."""
        if self.body.listed is None or not new.ids:
            return None
        if self.is_chat:
            return self.logprobs.write_chat(new.ids, new.likelihoods)
        offset = self._offsets.get(new.index, 0)
        self._offsets[new.index] = offset + self.logprobs.measure(new.ids)
        return self.logprobs.write_completion(new.ids, new.likelihoods, offset)

    def _write_event(
        self, choices: list[ChoiceForm], total: int, *, last: bool = False, prompt: list[int] | None = None
    ) -> str:
        event = self._make("chat.completion.chunk" if self.is_chat else "text_completion", choices)
        if prompt is not None:
            event.prompt_token_ids = prompt
        options = self.body.stream_options
        if options is not None and options.include_usage:
            event.usage = self._count(total) if last or options.continuous_usage_stats else None
        return f"data: {event.model_dump_json(exclude_unset=True)}\n\n"

    def _make(self, kind: str, choices: list[ChoiceForm]) -> AnswerForm:
        return AnswerForm(id=self.ident, object=kind, created=self.created, model=self.model, choices=choices)

    def _make_choice(self, index: int, reason: str | None) -> ChoiceForm:
        return ChoiceForm(index=index, logprobs=None, finish_reason=reason)

    def _count(self, completion: int) -> Usage:
        total = self.counted + completion
        return Usage(prompt_tokens=self.counted, completion_tokens=completion, total_tokens=total)


async def answer_whole(writer: Writer, generation: Generation) -> str:
    """Wait for all choices. Raises ApiError when the engine fails at one of them."""
    choices = [Choice(index) for index in range(len(writer.prompts))]
    async for piece in generation.pieces():
        choices[piece.index].add(piece)
    return writer.write_whole(choices)


async def answer_events(writer: Writer, generation: Generation) -> AsyncIterator[str]:
    """Give the events of a stream as the choices grow; a failure is its last but one."""
    totals = [0] * len(writer.prompts)
    for event in writer.begin_events():
        yield event
    try:
        async for piece in generation.pieces():
            totals[piece.index] = piece.total
            yield writer.write_piece(piece, sum(totals))
    except ApiError as error:
        yield error.write_event()
        yield DONE
        return
    for event in writer.end_events(sum(totals)):
        yield event


class EventResponse(StreamingResponse):
    """A stream of events; however it ends, the generation does with it."""

    def __init__(self, writer: Writer, generation: Generation) -> None:
        super().__init__(answer_events(writer, generation), media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or stop where the client leaves."""
        with self._generation:
            await super().__call__(scope, receive, send)
