"""A request's choices on their way: submitted together, their texts piece by piece, ended when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood
from laguna_serve.plugins.diffusion.engine.loop import Engine, Handle
from laguna_serve.plugins.diffusion.engine.requests import (
    Committed,
    EngineStoppedError,
    Event,
    Finished,
    QueueFullError,
    Request,
)
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.errors import ApiError
from laguna_serve.plugins.diffusion.server.texts import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a choice.

    Attributes:
        ids: new tokens, that of the end included.
        total: tokens of the choice so far.
        reason: why it has ended, None while it has not.
        stopped_by: the string or id that ended it, but for the model's own ends.
        likelihoods: of the ids, where they were asked for.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    total: int
    reason: str | None = None
    stopped_by: str | int | None = None
    likelihoods: tuple[Likelihood, ...] = ()


class Generation:
    """Choices of one HTTP request; a block `with` it aborts what has not ended when it is left."""

    def __init__(self, engine: Engine, requests: Sequence[Request], streams: Sequence[TextStream],
                 ends: frozenset[int]) -> None:  # fmt: skip
        """Prepare it; `ends` are the model's own ends, that no answer needs to name."""
        self._engine, self._requests, self._streams, self._ends = engine, requests, streams, ends
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._pending: dict[int, list[int]] = {index: [] for index in range(len(requests))}
        self._likelihoods: dict[int, list[Likelihood]] = {index: [] for index in self._pending}

    def submit(self) -> None:
        """Submit all choices, or none.

        Raises:
            ApiError: the engine does not take them, or has never room for so many.
        """
        if len(self._requests) > self._engine.most:
            got = f"at most {self._engine.most} answers at once, got {len(self._requests)}"
            raise ApiError(400, f"prompt: expected {got}; send fewer prompts or choices in a request", "prompt")
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self._requests):
                deliver = partial(self._note, loop, index)
                self._handles.append(self._engine.submit(request, deliver))
        except DiffusionError as error:
            self._cancel()
            raise ApiError(400, str(error)) from None
        except (QueueFullError, EngineStoppedError) as error:
            self._cancel()
            raise ApiError(503, f"engine: {error}; ask again later") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Give what is new as it comes, until all choices have ended.

        Raises:
            ApiError: the engine failed at one of them.
        """
        while self._pending:
            index, event = await self._events.get()
            if index not in self._pending:
                continue  # ended by a stop string; the engine may have gone on for a pass
            if isinstance(event, Committed):
                self._pending[index] += event.tokens
                self._likelihoods[index] += event.likelihoods
                piece = self._take(index, None)
            else:
                piece = self._take(index, event)
            piece = self._add_likelihoods(piece)
            if piece.reason is not None:
                if piece.stopped_by is not None:  # a string, of which the engine does not know
                    self._handles[index].cancel("stop")
                del self._pending[index]
            if piece.text or piece.ids or piece.reason is not None:
                yield piece

    def _take(self, index: int, end: Finished | None) -> Piece:
        """Turn tokens into text; one that ends an answer says nothing, and waits for the word that it does."""
        stream, pending, stop = self._streams[index], self._pending[index], self._requests[index].stop
        if end is not None and end.reason not in ("stop", "length"):
            message = end.error or "the engine was stopped while it answered"
            raise ApiError(500 if end.reason == "error" else 503, f"engine: {message}")
        held = 1 if pending and pending[-1] in stop else 0
        ids = tuple(pending) if end is not None else tuple(pending[: len(pending) - held])
        unspoken = held if end is not None and end.reason == "stop" else 0
        before = stream.tokens
        text = stream.push(ids, last=end is not None, unspoken=unspoken)
        self._pending[index] = pending[len(ids) :]
        new, total = ids[: stream.tokens - before], stream.tokens
        if stream.stopped is not None:
            return Piece(index, text, new, total, "stop", stream.stopped)
        if end is None:
            return Piece(index, text, new, total)
        ended_by = ids[-1] if unspoken and ids[-1] not in self._ends else None
        return Piece(index, text, new, total, end.reason, ended_by)

    def _add_likelihoods(self, piece: Piece) -> Piece:
        if self._requests[piece.index].listed is None:
            return piece
        waiting, count = self._likelihoods[piece.index], len(piece.ids)
        self._likelihoods[piece.index] = waiting[count:]
        return replace(piece, likelihoods=tuple(waiting[:count]))

    def _note(self, loop: asyncio.AbstractEventLoop, index: int, event: Event) -> None:
        """Take an event over from the engine's thread; raises where the loop is closed."""
        loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _cancel(self) -> None:
        for index, handle in enumerate(self._handles):
            if index in self._pending:
                handle.cancel()
