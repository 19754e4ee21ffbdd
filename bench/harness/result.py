"""The result of an A/B: `ab.json`, schema laguna_serve.ab/1. A figure that validity.py withholds is None."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct, UnsetType

from laguna_serve.bench.stats.drift import Drift
from laguna_serve.bench.stats.intervals import Spread
from laguna_serve.bench.stats.parity import Verdict
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.records import RequestRecord
from laguna_serve.serving.engine.figures import EngineFigures
from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.machine.memory import EngineMemory


class Workload(Struct, frozen=True, kw_only=True):
    """What was sent, and how.

    `chat_prompts`: how many went through the model's chat template; `own_lengths`: how many asked for answers shorter
    than `max_tokens`; `waves`: a round is so many times `concurrency` prompts, the next sent as one ends; without it
    those of a round were sent together; `num_warmups`: untimed prompts, where they were asked for.
    """

    prompts_file: str
    prompts: int
    max_tokens: int
    concurrency: int
    temperature: float = 0
    ignore_eos: bool = True
    seed: int
    interleaved: bool
    chat_prompts: int = 0
    own_lengths: int = 0
    waves: int | UnsetType = UNSET
    num_warmups: int | UnsetType = UNSET

    @property
    def unit(self) -> str:
        """What a round is called."""
        return "prompt" if self.concurrency == 1 and self.waves is UNSET else "round"


class ArmResult(Struct, frozen=True, kw_only=True):
    """One arm's figures over the timed rounds.

    Attributes:
        ttft_ms: request sent → first token.
        itl_ms: per token, a chunk's gap spread over its tokens.
        chunk_gap_ms: between chunks: under speculation a step.
        e2e_ms: request sent → last token.
        counters: what vLLM counted meanwhile.
        ended: answers that ended by themselves, before max_tokens.
        engine: its memory by what it is for, by its own words; `memory` is what its processes hold, on a GPU a reserved
            share. None for an endpoint that was not started here.
    """

    label: str
    command: list[str] | None
    requests: int
    failed: int
    output_tokens: int
    wall_s: float
    tok_per_s: float | None
    ttft_ms: Spread | None
    itl_ms: Spread | None
    chunk_gap_ms: Spread | None
    tokens_per_chunk: Spread | None
    e2e_ms: Spread | None
    memory: EngineMemory | None
    counters: Counters | None
    ended: int = 0
    engine: EngineFigures | None = None


class RoundSpeedup(Struct, frozen=True, kw_only=True):
    """One round on both arms; `first`: the arm that ran it first."""

    prompts: str
    speedup: float | None
    first: str


class Speedup(Struct, frozen=True, kw_only=True):
    """Pooled candidate tok/s ÷ baseline tok/s, with its paired bootstrap interval, which allows for a drift."""

    point: float | None
    ci95: tuple[float, float] | None
    pairs: int
    per_round: list[RoundSpeedup]


class ControlResult(Struct, frozen=True, kw_only=True):
    """The baseline against itself."""

    prompts: int
    mismatches: int


class ParitySummary(Struct, frozen=True, kw_only=True):
    """Equality of the arms' greedy answers, in numbers.

    Attributes:
        bound95: at 95% confidence, at most this share of such prompts differs.
        classes: mismatches by class: tie, near_tie, defect.
        noise_nats: of log-probabilities where the arms agree; None when nothing was re-requested.
    """

    prompts: int
    mismatches: int | None
    bound95: float | None
    classes: dict[str, int] | None
    noise_nats: float | None
    noise_multiple: float
    dtype: str
    control: ControlResult | None

    @property
    def defects(self) -> int:
        """Mismatches that rounding does not explain."""
        return (self.classes or {}).get("defect", 0)


class Parity(ParitySummary, frozen=True, kw_only=True):
    """The same with every mismatch."""

    divergences: list[Verdict]

    def summarise(self) -> ParitySummary:
        """Summarise the counts, without the divergences themselves."""
        return msgspec.convert(self, ParitySummary, from_attributes=True)


class ArmAcceptance(Struct, frozen=True, kw_only=True):
    """The candidate's `serving.client.counters.Acceptance`; None throughout when withheld, or without a drafter."""

    length: float | None = None
    rate: float | None = None
    per_position: list[float] | None = None
    drafts: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None


class Withheld(Struct, frozen=True, kw_only=True):
    """A figure that is not reported, as a path in this JSON, and why."""

    figure: str
    reason: str


class CertificateSummary(Struct, frozen=True, kw_only=True):
    """The parity certificate in short: verdict None when there is none, for the reasons."""

    verdict: str | None
    reasons: list[str]
    summary: str | UnsetType = UNSET


class ArmRequests(Struct, frozen=True, kw_only=True):
    """Every request to an arm."""

    timed: list[RequestRecord]
    control: list[RequestRecord]


class AbResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.ab/1"):
    """An A/B of two engines. `arms` and `requests` are keyed by "baseline" and "candidate".

    `forced_acceptance`, where answers stop at their end: over the same prompts made to go on past it. A model repeats
    itself there, and drafts of repetition are accepted: what ignoring the end adds to `acceptance`.

    One engine at a time, the baseline's figures are those of both its passes, the last of which is its control, too;
    `drift` compares them.
    """

    partial: bool
    stopped: str | None
    environment: Environment
    workload: Workload
    arms: dict[str, ArmResult]
    speedup: Speedup
    drift: Drift | UnsetType = UNSET
    parity: Parity
    acceptance: ArmAcceptance
    forced_acceptance: ArmAcceptance | UnsetType = UNSET
    refused: list[Withheld]
    requests: dict[str, ArmRequests]
    certificate: CertificateSummary | UnsetType = UNSET

    @property
    def interrupted(self) -> bool:
        """A person, or a signal, ended it early."""
        return self.stopped == INTERRUPTED


INTERRUPTED = "interrupted"


# The line for programs; `mismatches` counts what `divergences` has a few of.
LINE = Brief(without=("requests", "speedup.per_round"), first={"parity.divergences": 5})
