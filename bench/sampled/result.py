"""The result of bench/sampling.py: `sampling.json`, schema laguna_serve.sampling/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment


class SamplingWorkload(Struct, frozen=True, kw_only=True):
    """What was drawn: `completions` of `tokens` for each of so many prompts, from every arm."""

    prompts: int
    completions: int
    tokens: int
    temperature: float


class ArmComparison(Struct, frozen=True, kw_only=True):
    """An arm's completions against the baseline's.

    Attributes:
        pooled_p: of the sum over prompts; `least_adjusted_p`: of one prompt, corrected for their number.
        p: of the whole comparison; where it is at most `level`, the arm `differs`.
        p_values: of every prompt.
    """

    arm: str
    pooled_p: float
    least_adjusted_p: float
    p: float
    level: float
    differs: bool
    p_values: list[float]


class SamplingResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.sampling/1"):
    """Two-sample tests of every γ, and of the baseline itself, against the baseline.

    Attributes:
        draft_sampling: None in older results, which are greedy.
        power: share of completions turned into the likeliest one → how often that was found in simulation.
        detectable_share: the least of them that is found reliably.
    """

    environment: Environment
    model: str
    draft: str
    draft_sampling: str | None = None
    workload: SamplingWorkload
    level: float
    comparisons: list[ArmComparison]
    power: dict[str, float]
    detectable_share: float | None

    @property
    def held(self) -> bool:
        """Nothing differs from the baseline."""
        return not any(comparison.differs for comparison in self.comparisons)


# The line for programs: without the p-values of every prompt.
LINE = Brief(without=("comparisons.*.p_values",))
