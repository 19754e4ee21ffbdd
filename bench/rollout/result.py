"""The result of bench/rollouts.py: `rollouts.json`, schema laguna_serve.rollouts/1, and what DIR/points keeps of it."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, field

from laguna_serve.bench.stats.drift import Drift
from laguna_serve.serving.client.counters import Acceptance, Counters, sum_counters
from laguna_serve.serving.kit.environment import Environment

PAYS, LOSES, INCONCLUSIVE = "pays", "does not pay", "cannot be told"
Rates = dict[str, float]


class Work(Struct, frozen=True):
    """What every point has in common.

    `group`: completions per prompt; `device`: "cpu", "gpu", or "url" for endpoints, of whose device nothing is known.
    """

    group: int
    max_tokens: int
    temperature: float
    rounds: int
    seed: int
    device: str

    def split(self, batch: int) -> tuple[int, int]:
        """Split so many sequences into (requests, sequences of each): whole groups, or one smaller group."""
        return (1, batch) if batch < self.group else (batch // self.group, self.group)


class Turn(Struct, frozen=True):
    """One arm's half of a round: tokens that came back, seconds that they took, and the counters' delta."""

    tokens: int
    wall_s: float
    device_s: float
    delta: Counters = field(name="moved")

    def join(self, other: Turn) -> Turn:
        """Join the same work done twice, as one."""
        return Turn(
            self.tokens + other.tokens,
            self.wall_s + other.wall_s,
            self.device_s + other.device_s,
            sum_counters([self.delta, other.delta]),
        )


class MeasuredPoint(Struct, frozen=True, kw_only=True):
    """A point as DIR/points keeps it: every turn of both arms.

    Attributes:
        version: of the policy; None for the model itself.
        fingerprint: of the version's folder.
        drift: of the baseline, whose turns are then those of both its passes together.
    """

    version: str | None
    fingerprint: str
    batch: int
    requests: int
    sequences_per_request: int
    turns: dict[str, list[Turn]]
    drift: Drift | UnsetType = UNSET


class Estimate(Struct, frozen=True, kw_only=True):
    """A figure with its 95% interval."""

    point: float
    ci95: tuple[float, float]


class RolloutAcceptance(Acceptance, frozen=True, kw_only=True):
    """The candidate's acceptance; `ci95`: of its length."""

    ci95: tuple[float, float]


class RolloutPoint(Struct, frozen=True, kw_only=True):
    """Both arms at one batch size, for one version of the policy.

    Attributes:
        ratio: candidate ÷ baseline tok/s; `device_ratio`: per device-second, None where the clock is too coarse.
        acceptance: of the steps that drafted; None where none did.
        break_even: the τ at which speculation stops paying; None where γ was decided in every step.
        cached_share: of prompt tokens.
        price_per_million: of tokens, where an hour has a price.
        drift: of the baseline, where one engine was measured at a time; intervals allow for it.
    """

    batch: int
    version: str | None
    rounds: int
    tokens: int
    tok_per_s: Rates
    ratio: Estimate
    tok_per_device_s: Rates | None
    device_ratio: Estimate | None
    acceptance: RolloutAcceptance | None
    break_even: Estimate | None
    verdict: str
    cached_share: Rates
    preemptions: dict[str, int]
    price_per_million: Rates | None
    drift: Drift | UnsetType = UNSET


class RolloutsWorkload(Work, frozen=True, kw_only=True):
    """The prompts and the sampling that every turn shared."""

    prompts: str
    prefix_caching: bool
    sequential: bool = False


class RolloutsResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.rollouts/1"):
    """What rollouts cost, plain and speculative. The first of `versions`, where there are any, is the model itself.

    Attributes:
        draft_sampling: None in older results, which are greedy.
        adaptive: γ was decided in every step, `gamma` at most.
        price: how prices per million are worked out, in words.
    """

    environment: Environment
    model: str
    draft: str
    draft_sampling: str | None = None
    gamma: int
    adaptive: bool = False
    device: str
    workload: RolloutsWorkload
    points: list[RolloutPoint]
    versions: list[RolloutPoint]
    price: str
    price_per_hour: float | None

    @property
    def how_many(self) -> str:
        """How many tokens were drafted."""
        return f"adaptive γ up to {self.gamma}" if self.adaptive else f"γ {self.gamma}"

    @property
    def pays(self) -> bool:
        """Speculation pays at every batch and for every version."""
        return all(point.verdict == PAYS for point in [*self.points, *self.versions])
