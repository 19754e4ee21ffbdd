"""The result of bench/diffusion: `diffusion.json`, schema laguna_serve.diffusion_proposals/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.bench.stats.intervals import RoundPair
from laguna_serve.serving.kit.environment import Environment


class ProposerPoint(Struct, frozen=True, kw_only=True):
    """One proposer with so many requests in a pass.

    Attributes:
        steps_per_pass: the reference's steps ÷ passes of the target; `steps_per_pass_ci95`: bootstrapped over rounds,
            None of few.
        accepted: of the states proposed, the share that the decode came by.
        tokens_per_s: of committed tokens.
        speedup: tokens per second ÷ those without proposals, the same prompts in turn; `speedup_ci95` likewise.
        differing: answers that are not the reference's; anything but 0 is a defect.
        rounds: tokens and seconds without and with proposals.
        counts: steps and passes of each round.
    """

    proposer: str
    concurrency: int
    steps_per_pass: float
    steps_per_pass_ci95: tuple[float, float] | None
    accepted: float
    tokens_per_s: float
    speedup: float
    speedup_ci95: tuple[float, float] | None
    differing: int
    rounds: list[RoundPair]
    counts: list[tuple[int, int]]


class ReferencePoint(Struct, frozen=True, kw_only=True):
    """A reference decode without proposals: how fast, and how far its texts are from those of R1 without a cache.

    Attributes:
        agreement: the share of positions with the same token; other references are other texts, not worse ones.
    """

    schedule: str
    cache: str
    steps: int
    tokens_per_s: float
    agreement: float


class DraftPoint(Struct, frozen=True, kw_only=True):
    """A draft whose matrices have fewer bits than the target's.

    Attributes:
        weights: fp8, int8 or int4.
        cost: a pass of it in passes of the target, by the bytes that each reads.
        next_commits: as of the result.
        points: what proposes by it, one request at a time.
    """

    weights: str
    cost: float
    next_commits: tuple[float, float]
    points: list[ProposerPoint]


class DiffusionResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.diffusion_proposals/1"):
    """What proposals bring, and what the references cost.

    Attributes:
        cost: a pass of the draft in passes of the target, by the bytes that each reads.
        next_commits: along the target's decode, how often the draft commits at the same position next, and how often
            it comes to the same state; None without a draft.
        drafts: the same draft in fewer bits.
        dtype: of both models; None in older results, which are float32.
    """

    environment: Environment
    model: str
    draft: str | None
    cost: float | None
    schedule: str
    cache: str
    canvas: int
    block: int
    prompts: int
    states: int
    next_commits: tuple[float, float] | None
    points: list[ProposerPoint]
    references: list[ReferencePoint]
    drafts: list[DraftPoint] = []
    dtype: str | None = None
    partial: bool = False
