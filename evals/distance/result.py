"""The result of a comparison of references: references.json, schema laguna_serve.references/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment


class Workload(Struct, frozen=True, kw_only=True):
    """What was asked. `cut`: prompts that were cut from the left to `longest` tokens, the longest that was sent."""

    prompts_file: str
    prompts: int
    cut: int
    longest: int
    max_tokens: int
    concurrency: int
    temperature: float = 0
    seed: int


class Judge(Struct, frozen=True, kw_only=True):
    """Who gave the losses.

    Attributes:
        shortened: prompts of which it read the end alone, as they do not fit its context.
        unscored: prompts to which some reference gave an empty answer, which has no loss: no reference's mean has them.
    """

    label: str
    shortened: int
    unscored: int


class Score(Struct, frozen=True, kw_only=True):
    """A mean over prompts, and how much higher it is than the baseline's.

    Attributes:
        difference: paired over prompts; None for the baseline.
        ci95: bootstrap interval of it over prompts; None with fewer than two.
        prompts: how many.
    """

    mean: float
    difference: float | None
    ci95: tuple[float, float] | None
    prompts: int


class TokenDistance(Struct, frozen=True, kw_only=True):
    """How far a reference's tokens are from the baseline's.

    Attributes:
        identical: prompts whose answers have the same tokens, all of them.
        same: positions at which both answers have the same token; `positions`: of all, by the longer answer of each
            prompt, so that what only one of them has counts as another token.
        share: same ÷ positions.
    """

    identical: int
    same: int
    positions: int
    share: float


class Speed(Struct, frozen=True, kw_only=True):
    """What answers took, an engine's first ones included, over the stretches of asking that came to their end.

    Attributes:
        answers: that were counted.
        steps_per_answer: denoising steps; None where the engine counts none.
    """

    answers: int
    steps_per_answer: float | None
    tokens_per_s: float


class MeasuredReference(Struct, frozen=True, kw_only=True):
    """One reference.

    Attributes:
        tokens_per_answer: the mean, the token that ends an answer included.
        distance: None for the baseline.
        loss: nats per token of an answer given its prompt, under the judge; None where every prompt is unscored.
        python_lines: share of an answer's lines that are Python (evals/codegen/syntax_reward.py).
        speed: None where no stretch of asking came to its end.
    """

    label: str
    tokens_per_answer: float
    distance: TokenDistance | None
    loss: Score | None
    python_lines: Score
    speed: Speed | None


class ComparedPrompt(Struct, frozen=True, kw_only=True):
    """One prompt: of every reference's answer its tokens, its loss in nats (summed) and its share of Python lines."""

    id: str
    prompt_tokens: int
    tokens: dict[str, int]
    nats: dict[str, float]
    python_lines: dict[str, float]


class ReferencesResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.references/1"):
    """references.json. `references`: by name, the baseline first."""

    environment: Environment
    workload: Workload
    judge: Judge
    references: dict[str, MeasuredReference]
    prompts: list[ComparedPrompt]


LINE = Brief(without=("prompts",))
