"""The result of a certificate: `certificate.json`, schema laguna_serve.certificate/1."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.bench.certificate.identity import Identity
from laguna_serve.serving.engine.row_check import RowCheck
from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment


class Replayed(Struct, frozen=True, kw_only=True):
    """What the exact model says where two arms part.

    Attributes:
        margin: nats between the two tokens; None where one is not among the best.
        top2: its best two, as (token, log-probability).
    """

    preferred: Literal["baseline", "candidate", "neither"]
    margin: float | None
    top2: list[tuple[int, float]]


class Divergence(Struct, kw_only=True):
    """One prompt's mismatch in its context.

    `bench.stats.parity.Verdict`, of the very forward passes that chose the tokens. `replay` is filled in when the third
    path has been asked.
    """

    prompt_id: str
    index: int | None
    classification: str
    reason: str
    baseline_token: int | None
    candidate_token: int | None
    baseline_top2: list[tuple[int, float]] | None = None
    candidate_top2: list[tuple[int, float]] | None = None
    baseline_margin: float | None = None
    candidate_margin: float | None = None
    before: str
    baseline_text: str
    candidate_text: str
    replay: Replayed | UnsetType = UNSET


class NotOwnBest(Struct, frozen=True, kw_only=True):
    """An emitted token that its own step's log-probabilities do not put first."""

    prompt_id: str
    index: int
    token: int
    top: list[tuple[int, float]]


class Difference(Struct, frozen=True, kw_only=True):
    """Absolute differences of log-probabilities (nats) from the baseline's where tokens agree."""

    mean: float
    p50: float
    p99: float
    max: float
    n: int


class Comparison(Struct, frozen=True, kw_only=True):
    """One arm against the baseline at one load.

    Attributes:
        bound95: at 95% confidence, at most this share of such prompts differs; `defect_bound95`: beyond rounding.
        classes: mismatches by class: tie, near_tie, defect.
        first_index: of the earliest divergence, in tokens.
        other_prompts: prompts that were read as other tokens than the baseline's.
    """

    prompts: int
    tokens: int
    mismatches: int
    bound95: float
    classes: dict[str, int]
    defect_bound95: float
    first_index: int | None
    difference: Difference | None
    not_own_best: list[NotOwnBest]
    other_prompts: int
    divergences: list[Divergence]


class Drift(Struct, frozen=True, kw_only=True):
    """The candidate's mean difference from the baseline ÷ the row-matched control's, with its interval over prompts."""

    ratio: float | None
    ci95: tuple[float, float] | None
    drifts: bool


class LoadResult(Struct, frozen=True, kw_only=True):
    """One concurrency; `reasons` lists what makes it a defect."""

    concurrency: int
    noise: float
    candidate: Comparison
    controls: dict[str, Comparison]
    drift: Drift | None
    reasons: list[str]


class CertificateWorkload(Struct, frozen=True, kw_only=True):
    """What was sent, and how.

    `own_lengths`: how many asked for answers shorter than `max_tokens`; `identical`: no difference was allowed, not
    even a tie.
    """

    prompts: int
    max_tokens: int
    own_lengths: int = 0
    concurrency: list[int]
    dtype: str
    temperature: float = 0
    identical: bool = False
    ignore_eos: bool = True
    seed: int


class CertifiedArm(Struct, frozen=True, kw_only=True):
    """An arm; `acceptance`: its tokens per step, None without drafts.

    `root`: of an endpoint by URL, where it says that its model was loaded from.
    """

    label: str
    command: list[str] | None
    acceptance: float | None
    root: str | None = None


class StreamCheck(Struct, frozen=True, kw_only=True):
    """Answers streamed without log-probabilities against those that were examined."""

    prompts: int
    differing: int
    beyond_noise: int


class ReplaySummary(Struct, frozen=True, kw_only=True):
    """How often the exact model sided with whom, and the two-sided sign test's p."""

    replayed: int
    baseline: int
    candidate: int
    neither: int
    sign_test_p: float | None


class Certificate(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.certificate/1"):
    """A parity certificate.

    Attributes:
        missing: of a control or path that could not be had, why.
        replay: None where nothing was replayed.
        identity: where it applies; None for endpoints by URL, and for those made before there was one.
        row_check: which operation differs first; None where that was not asked.
    """

    verdict: str
    reasons: list[str]
    environment: Environment
    workload: CertificateWorkload
    arms: dict[str, CertifiedArm]
    missing: dict[str, str]
    streams: dict[str, StreamCheck]
    replay: ReplaySummary | None
    loads: list[LoadResult]
    identity: Identity | None = None
    row_check: RowCheck | None = None


# The line for programs: of the long lists a few items, or how many there are.
LINE = Brief(
    first={"loads.*.candidate.divergences": 3, "loads.*.controls.*.divergences": 3},
    counted=("loads.*.candidate.not_own_best", "loads.*.controls.*.not_own_best"),
)
