"""The result of a γ sweep: `sweep.json`, schema laguna_serve.gamma_sweep/1, and what DIR/points keeps of it."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, field

from laguna_serve.bench.harness.result import ParitySummary
from laguna_serve.bench.stats.drift import Drift
from laguna_serve.bench.stats.intervals import RoundPair
from laguna_serve.bench.stats.parity import Verdict
from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.machine.memory import EngineMemory

Rates = dict[str, float]
Interval = tuple[float, float]


class PointFigures(Struct, frozen=True, kw_only=True):
    """One γ at one concurrency against plain decoding.

    Attributes:
        tau: tokens per step; `per_position[i]`: share of drafts whose token i was accepted.
        step_cost: of a speculative step, in plain steps.
        draft_share: of a step, the drafter's part; None where there were too few prompts to tell.
        drift: of the baseline, where one engine was measured at a time; `ci95` allows for it.
        beyond_block: more tokens than the drafter was trained to propose.
    """

    gamma: int
    concurrency: int
    speedup: float
    ci95: Interval
    tau: float
    per_position: list[float]
    step_cost: float
    draft_share: float | None
    tok_per_s: Rates
    memory: dict[str, EngineMemory | None]
    parity: ParitySummary
    divergences: list[Verdict]
    drift: Drift | UnsetType = UNSET
    beyond_block: bool = False


class MeasuredPoint(PointFigures, frozen=True, kw_only=True):
    """A point as DIR/points keeps it: with the rounds of its A/B."""

    pairs: list[RoundPair]


class SweepPoint(PointFigures, frozen=True, kw_only=True):
    """A point of the result; `predicted`: the speed-up by the cost model."""

    predicted: float


class AdaptivePoint(PointFigures, frozen=True, kw_only=True):
    """γ decided in every step, up to `gamma`, at one concurrency.

    Attributes:
        best: the fixed γ that was fastest there, 0 for plain decoding; `scheduled`: the schedule's.
        against_best: tok/s over that one's, both as ratios to plain decoding; with its 95% interval.
        tau: of the steps that drafted; `step_cost` of all.
    """

    best: int
    scheduled: int
    against_best: float
    against_best_ci95: Interval


class Choice(Struct, frozen=True):
    """γ for one concurrency, 0 for plain decoding, and the reason in a few words."""

    concurrency: int
    gamma: int
    reason: str


class Schedule(Struct, frozen=True):
    """γ by batch size as vLLM takes it: (first, last, γ)."""

    num_speculative_tokens_per_batch_size: list[tuple[int, int, int]]


class StepCost(Struct, frozen=True, kw_only=True):
    """A step with γ drafted tokens costs 1 + fixed + per_token · γ plain steps."""

    fixed: float
    per_token: float


class PlainTarget(Struct, frozen=True, kw_only=True):
    """The plain target's greedy answers, and its loss on the prompts (nats per token, over `tokens`)."""

    gamma: int
    token_ids: list[list[int]]
    loss: float
    tokens: int


class AblationResult(Struct, frozen=True, kw_only=True):
    """An ablation at γ: speculation against its own plain decoding, and that against the plain target.

    Attributes:
        failed: why there are no figures; then the others are unset.
        differ_from_plain_target: prompts whose plain answers differ.
        loss_change: of the loss on the prompts (nats per token), against the plain target's.
        drift: of the ablation's own plain decoding, where one engine was measured at a time.
    """

    ablation: str = field(name="lever")
    checkpoint: str | None
    gamma: int
    speedup: float | UnsetType = UNSET
    ci95: Interval | UnsetType = UNSET
    tau: float | UnsetType = UNSET
    tok_per_s: Rates | UnsetType = UNSET
    memory: dict[str, EngineMemory | None] | UnsetType = UNSET
    parity: ParitySummary | UnsetType = UNSET
    failed: str | None
    differ_from_plain_target: int | UnsetType = UNSET
    loss: float | UnsetType = UNSET
    loss_change: float | UnsetType = UNSET
    drift: Drift | UnsetType = UNSET


class MixedLoad(Struct, frozen=True, kw_only=True):
    """The schedule (candidate) against the best single γ (baseline); `skipped` says why there is none to compare."""

    single: int
    schedule: list[tuple[int, int, int]] | UnsetType = UNSET
    skipped: str | None
    rounds: int | UnsetType = UNSET
    prompts: int | UnsetType = UNSET
    speedup: float | None
    ci95: Interval | UnsetType = UNSET
    parity: ParitySummary | UnsetType = UNSET
    drift: Drift | UnsetType = UNSET


class SweepWorkload(Struct, frozen=True, kw_only=True):
    """The prompts that every point of a sweep was asked; `sequential`: one engine at a time, at some of them.

    `own_lengths`: how many asked for answers shorter than `max_tokens`.
    `temperature`: above 0 answers were drawn, and not compared; `draft_sampling`: drafts were drawn, too, or not;
    None in older results, which are greedy. `waves`, `num_warmups`: as of ab.py's rounds.
    """

    prompts: str
    num_prompts: int
    max_tokens: int
    own_lengths: int = 0
    sequential: bool = False
    temperature: float = 0.0
    draft_sampling: str | None = None
    waves: int | UnsetType = UNSET
    num_warmups: int | UnsetType = UNSET


class SweepResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.gamma_sweep/1"):
    """A sweep over γ.

    Attributes:
        stored: the file of the schedule that `laguna serve --gamma auto` finds; None of endpoints, and
            where no γ within the drafter's block was measured.
        cost: by concurrency.
        failed: γ, or "adaptive" → why it is not among the points, or not everywhere.
    """

    environment: Environment
    model: str
    draft: str
    workload: SweepWorkload
    choices: list[Choice]
    schedule: Schedule
    stored: str | None
    cost: dict[str, StepCost]
    failed: dict[str, str]
    points: list[SweepPoint]
    adaptive: list[AdaptivePoint] | UnsetType = UNSET
    stack: list[AblationResult] | UnsetType = UNSET
    mixed: MixedLoad | UnsetType = UNSET

    @property
    def held(self) -> bool:
        """Everything was measured, and no divergence is a defect."""
        ablations = self.stack or []
        parities = [point.parity for point in [*self.points, *(self.adaptive or [])]] + [
            item.parity for item in ablations if item.parity
        ]
        failed = self.failed or any(item.failed for item in ablations)
        return not failed and not any(parity.defects for parity in parities)


def publish_point(point: MeasuredPoint, predicted: float) -> SweepPoint:
    """Without its rounds, with the prediction."""
    figures = {name: getattr(point, name) for name in PointFigures.__struct_fields__}
    return SweepPoint(**figures, predicted=predicted)


# The line for programs.
LINE = Brief(counted=("points",))
