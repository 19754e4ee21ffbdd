"""Reference decodes: which tokens a step commits, as a function of the state and of its logits alone.

R1 commits one token a step, Rk k of them, `Evenly(s)` spreads a block over s steps as LLaDA's own loop does, and
`Threshold(τ)` commits all that are likelier than τ, at least one. Everything that decides the text is in `Reference`:
a run is lossless if it commits what the same reference does.

What differs from the published loop, on purpose: the likelihood of the chosen token is a log-softmax in fp32, ties go
to the lowest position, and of ids to the lowest; the noise is a function of the state; the mask itself is never chosen.

Source: ML-GSAI/LLaDA, generate.py, for what is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.noise import draw_gumbel
from laguna_serve.plugins.diffusion.errors import DiffusionError

Cache = Literal["none", "prefix", "dual"]
# Of what logits are multiplied with: fp32 has no room for much more, and infinite ones choose nothing.
MOST_SCALE = 1e6


class Schedule(Protocol):
    """How many of a block's masked positions a step commits."""

    def count(self, confidences: torch.Tensor, block_length: int) -> int:
        """Count them, given the log-probabilities [left] of all that are left, falling; at least 1."""


@dataclass(frozen=True, slots=True)
class PerStep:
    """So many tokens a step: R1, R2 and so on."""

    tokens: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise DiffusionError(f"tokens per step: expected at least 1, got {self.tokens}")

    def count(self, confidences: torch.Tensor, block_length: int) -> int:
        return min(self.tokens, len(confidences))


@dataclass(frozen=True, slots=True)
class Evenly:
    """A block in so many steps, the earlier ones one more where it does not divide evenly."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise DiffusionError(f"steps per block: expected at least 1, got {self.steps}")

    def count(self, confidences: torch.Tensor, block_length: int) -> int:
        """Count from what is left: which step it is follows from that, as every step commits something."""
        base, more = divmod(block_length, self.steps)
        done = block_length - len(confidences)
        return base + (done < more * (base + 1))


@dataclass(frozen=True, slots=True)
class Threshold:
    """All whose probability is above it, at least one."""

    probability: float

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise DiffusionError(f"threshold: expected a probability between 0 and 1, got {self.probability}")

    def count(self, confidences: torch.Tensor, block_length: int) -> int:
        return max(1, int((confidences > math.log(self.probability)).sum()))


@dataclass(frozen=True, slots=True)
class Reference:
    """All that decides what is committed, besides model, prompt and canvas.

    Attributes:
        temperature: of the Gumbel noise on the logits; 0 takes the likeliest.
        guidance: the published cfg_scale: logits move away from those without the prompt; 0 leaves them.
        cache: what of a block's surroundings is computed once, when it is opened: nothing, what is before it, or
            everything else. Another cache is another reference: its texts differ.
    """

    schedule: Schedule = PerStep()
    temperature: float = 0.0
    seed: int = 0
    guidance: float = 0.0
    cache: Cache = "none"

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("guidance", self.guidance)):
            if not 0 <= value <= MOST_SCALE:
                raise DiffusionError(f"{name}: expected 0 or more, at most {MOST_SCALE:,.0f}, got {value}")


def read_reference(schedule: str, cache: str) -> Reference:
    """Read a reference as a flag has it: tokens a step as a whole number, or a threshold as a fraction; and a cache.

    Raises:
        DiffusionError: it is neither, or no cache.
    """
    if cache not in get_args(Cache):
        raise DiffusionError(f"cache: expected {', '.join(get_args(Cache))}, got {cache!r}")
    try:
        read = PerStep(int(schedule)) if schedule.isdecimal() else Threshold(float(schedule))
    except ValueError:
        raise DiffusionError(f"schedule: expected tokens a step or a threshold, got {schedule!r}") from None
    return Reference(read, cache=cast(Cache, cache))


@dataclass(frozen=True, slots=True)
class Ranking:
    """The masked positions of a state's open block, the most confident first.

    Attributes:
        positions, tokens: of the answer, and the id that each would get.
        confidences: log-probabilities [left] fp32 of those ids, falling.
    """

    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    confidences: torch.Tensor


def rank(canvas: Canvas, reference: Reference, state: State, logits: torch.Tensor) -> Ranking:
    """Rank a state's open positions by logits [block_length, vocabulary] fp32 of its open block."""
    block = canvas.find_block(state)
    assert block is not None
    open_ = canvas.list_open(state)
    rows = logits[[at - block.start for at in open_]]
    tokens = _choose_tokens(rows, canvas, reference, open_)
    confidences = torch.log_softmax(rows, -1).gather(-1, tokens[:, None]).squeeze(-1)
    confidences, order = torch.sort(confidences, descending=True, stable=True)
    places = order.tolist()
    chosen = tokens.tolist()
    return Ranking(tuple(open_[place] for place in places), tuple(chosen[place] for place in places), confidences)


def _choose_tokens(rows: torch.Tensor, canvas: Canvas, reference: Reference, open_: list[int]) -> torch.Tensor:
    """Choose the ids [left] with the largest (noisy) logits, of equal ones the lowest."""
    values = rows.clone()
    if reference.temperature > 0:
        noise = [draw_gumbel(reference.seed, at, len(open_), rows.shape[-1], rows.device) for at in open_]
        values += reference.temperature * torch.stack(noise)
    values[:, canvas.mask_id] = -math.inf
    ids = torch.arange(rows.shape[-1], device=rows.device)
    return torch.where(values == values.amax(-1, keepdim=True), ids, rows.shape[-1]).amin(-1)


def step(canvas: Canvas, reference: Reference, state: State, logits: torch.Tensor) -> State:
    """Return the state's one successor, by logits [block_length, vocabulary] fp32 that were computed for this state."""
    ranking = rank(canvas, reference, state, logits)
    count = reference.schedule.count(ranking.confidences, canvas.block_length)
    return canvas.commit(state, dict(zip(ranking.positions[:count], ranking.tokens[:count], strict=True)))
