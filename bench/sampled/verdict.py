"""Tests every arm's completions against the baseline's, and simulates what the test would find; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laguna_serve.bench.arms.arms import BASELINE
from laguna_serve.bench.sampled.completions import AGAIN, Sets, name_gamma
from laguna_serve.bench.sampled.options import Gamma, SamplingConfig
from laguna_serve.bench.sampled.result import ArmComparison
from laguna_serve.bench.stats.two_sample import Comparison, compare, find_power
from laguna_serve.serving.kit.flags import FlagError

PERMUTATIONS = 20_000
# Of the simulation of power: arms simulated per share, and permutations in each of their tests.
TRIALS, TRIAL_PERMUTATIONS = 40, 2_000
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
WANTED_POWER = 0.8
# Of the permutations of one comparison, which are all in memory together.
MOST_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Judgement:
    """The comparisons, the power by share, and the least share with enough of it."""

    comparisons: list[ArmComparison]
    power: dict[float, float]
    detectable_share: float | None


def check_level(config: SamplingConfig, gammas: int) -> None:
    """Refuse a level for which no machine has the memory.

    Raises:
        FlagError: so many prompts, completions and γ cannot be tested at it.
    """
    each = config.level / gammas
    if not count_permutations(config.num_prompts, each) * 2 * config.completions * 4 <= MOST_BYTES:
        least = 4 * config.num_prompts * gammas * 2 * config.completions * 4 / MOST_BYTES
        expected = f"expected at least {least:.2g} with {config.num_prompts} prompts × {config.completions} completions"
        raise FlagError(f"--level: {expected}, got {config.level:g}; raise it, or lower those")


def count_permutations(prompts: int, level: float) -> float:
    """Count those of a comparison: the least p-value, 1 ÷ their number, must lie below the level as it is corrected."""
    return max(PERMUTATIONS, 4 * prompts / level)


def judge(sets: Sets, gammas: Sequence[Gamma], level: float, seed: int) -> Judgement:
    """Test the control and every γ. The level is shared by the γ; the control stands by itself."""
    rng = np.random.default_rng(seed)
    prompts = len(sets[BASELINE])
    each = level / len(gammas)
    levels = {AGAIN: level, **{name_gamma(gamma): each for gamma in gammas}}
    permutations = round(count_permutations(prompts, each))
    comparisons = {name: compare(sets[BASELINE], sets[name], rng, permutations) for name in levels}
    pool = [[*a, *b] for a, b in zip(sets[BASELINE], sets[AGAIN], strict=True)]
    trial = max(TRIAL_PERMUTATIONS, round(4 / each))
    power = {share: find_power(pool, share, each, rng, trials=TRIALS, permutations=trial) for share in SHARES}
    return Judgement(
        comparisons=[_describe(name, comparisons[name], levels[name]) for name in levels],
        power=power,
        detectable_share=next((share for share in SHARES if power[share] >= WANTED_POWER), None),
    )


def _describe(name: str, comparison: Comparison, level: float) -> ArmComparison:
    return ArmComparison(
        arm=name,
        pooled_p=comparison.pooled_p,
        least_adjusted_p=min(comparison.adjusted),
        p=comparison.least,
        level=level,
        differs=comparison.least <= level,
        p_values=comparison.p_values,
    )
