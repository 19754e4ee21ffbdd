"""The result of bench/step_cost: `step_cost.json`, schema laguna_serve.step_cost/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.bench.stats.intervals import RoundPair
from laguna_serve.serving.kit.environment import Environment


class ArmSteps(Struct, frozen=True, kw_only=True):
    """The decoding steps of one engine, in processor time.

    Attributes:
        step_ms: mean of a step.
        tokens_per_step: committed.
        parts_ms: label → mean per step, from a pass in which the parts were timed.
    """

    label: str
    gamma: int | None
    steps: int
    tokens: int
    step_ms: float
    tokens_per_step: float
    parts_ms: dict[str, float]


class StepCostResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.step_cost/1"):
    """What a drafted step costs in plain ones, one request at a time.

    Attributes:
        cost: processor time of a drafted step ÷ that of a plain one; `cost_ci95`: bootstrapped over prompts,
            None of few.
        speedup: tokens per second of processor time with a drafter ÷ without; `speedup_ci95` likewise.
        temperature: above 0 answers were drawn; `draft_sampling`: drafts were, too, or not; None in older
            results, which are greedy.
        differing: greedy prompts whose tokens differ.
        rounds: steps and seconds of both arms for every prompt; `tokens`: tokens and seconds.
    """

    environment: Environment
    model: str
    draft: str
    max_tokens: int
    temperature: float = 0.0
    draft_sampling: str | None = None
    prompts: int
    plain: ArmSteps
    drafted: ArmSteps
    cost: float
    cost_ci95: tuple[float, float] | None
    speedup: float
    speedup_ci95: tuple[float, float] | None
    differing: int | None
    rounds: list[RoundPair]
    token_rounds: list[RoundPair]
