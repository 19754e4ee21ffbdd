"""What will be sent, and in which order: decided before the first request, from the seed alone.

A round is `waves` × `concurrency` prompts for one arm, `concurrency` of them under way: in one wave all are sent
together, in more the next is sent as one ends. Both arms run every round one after the other, never at once, as they
share a machine. Which arm goes first alternates at random but evenly, so that a drift of the machine (heat,
another job) favours neither. Rounds are the unit of pairing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from laguna_serve.bench.arms.arms import ARMS, BASELINE, CANDIDATE
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.flags import Flag

# Of untimed prompts, where it is not said.
LEAST_WARMUPS = 4
Waves = Annotated[
    int,
    Flag(
        "prompts of a round in units of --concurrency: in one wave all are sent together and the longest ends alone; "
        "in more the next is sent as one ends, as under a steady load (default: 1)",
        metavar="N",
        at_least=1,
    ),
]
NumWarmups = Annotated[
    int | None,
    Flag(
        "untimed prompts before the timed ones, for each engine and load, from those behind the first --num-prompts: "
        "with many, an engine that learns as it serves is measured as one that has learned (default: --concurrency, "
        f"{LEAST_WARMUPS} at least)",
        metavar="N",
        at_least=1,
    ),
]
Round = tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Timed rounds with the order of the arms in each, warm-up rounds, and how many rounds the control repeats.

    `stop_at_eos`: answers may end before `max_tokens`; else end-of-sequence is ignored. `temperature`: above 0 answers
    are sampled without a seed, and not compared.
    """

    rounds: tuple[Round, ...]
    orders: tuple[tuple[str, str], ...]
    warmup: tuple[Round, ...]
    control: tuple[Round, ...]
    max_tokens: int
    concurrency: int
    seed: int
    stop_at_eos: bool = False
    temperature: float = 0.0
    waves: int = 1

    @property
    def num_warmups(self) -> int | None:
        """How many untimed prompts there are, where they are not as many as without being asked for."""
        count = sum(map(len, self.warmup))
        return None if count == count_warmups(None, self.concurrency) else count

    @property
    def prompts(self) -> list[Prompt]:
        """The timed prompts in order."""
        return [prompt for prompts in self.rounds for prompt in prompts]


def make_plan(
    timed: Sequence[Prompt],
    warmup: Sequence[Prompt],
    *,
    max_tokens: int,
    concurrency: int,
    control: int,
    seed: int,
    stop_at_eos: bool = False,
    temperature: float = 0.0,
    waves: int = 1,
) -> Plan:
    """Lay out a run. `control`: how many of the first timed prompts the baseline runs again (rounded up to rounds)."""
    rounds = _cut(timed, waves * concurrency)
    return Plan(
        rounds=rounds,
        orders=draw_orders(len(rounds), seed),
        warmup=_cut(warmup, waves * concurrency),
        control=() if temperature else rounds[: -(-control // (waves * concurrency))],
        max_tokens=max_tokens,
        concurrency=concurrency,
        seed=seed,
        stop_at_eos=stop_at_eos,
        temperature=temperature,
        waves=waves,
    )


def count_warmups(asked: int | None, concurrency: int) -> int:
    """Count the untimed prompts: so many as are asked for, or as are under way at once."""
    return max(LEAST_WARMUPS, concurrency) if asked is None else asked


def _cut(prompts: Sequence[Prompt], size: int) -> tuple[Round, ...]:
    return tuple(tuple(prompts[start : start + size]) for start in range(0, len(prompts), size))


def draw_orders(count: int, seed: int) -> tuple[tuple[str, str], ...]:
    """Draw half the rounds each way (one more of either if odd), shuffled."""
    orders = [ARMS if index % 2 == 0 else (CANDIDATE, BASELINE) for index in range(count)]
    random.Random(seed).shuffle(orders)
    return tuple(orders)
