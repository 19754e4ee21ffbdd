"""What the engine is asked, and what it answers: tokens as they are committed, and at last how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood
from laguna_serve.plugins.diffusion.decoding.reference import Reference

# As vLLM calls them.
Reason = Literal["stop", "length", "abort", "error"]


class QueueFullError(RuntimeError):
    """As many requests wait as may; one more is refused."""


class EngineStoppedError(RuntimeError):
    """The engine takes no requests any more: it is being stopped, or has died."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted.

    Attributes:
        stop: ids that end it.
        limit: tokens after which it ends in any case; None: the canvas.
        listed: so many of the likeliest ids come with each token's likelihood; None: no likelihoods.
    """

    canvas: Canvas
    reference: Reference
    stop: frozenset[int] = frozenset()
    limit: int | None = None
    listed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine takes.

    Attributes:
        sequence: tokens of one request's prompt and canvas.
        vocabulary: ids of prompts are below it.
        running: requests that share passes.
        waiting: beyond those; one more is refused.
        tokens: of prompts and canvases of those that share passes, as far as what is kept for them has room.
        open_positions: of the blocks that are open in a pass, whose logits are all there at once; None: as many.
    """

    sequence: int
    vocabulary: int
    running: int
    waiting: int
    tokens: int | None = None
    open_positions: int | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """Ids that follow those before without a gap; they never change again. Likelihoods: theirs, where asked for."""

    tokens: tuple[int, ...]
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request. `error`: what went wrong, in a line."""

    reason: Reason
    error: str | None = None


Event = Committed | Finished
# Called in the engine's thread; one that raises ends its own request.
Deliver = Callable[[Event], None]
