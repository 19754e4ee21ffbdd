"""The arithmetic: answers, losses and times in, figures out. Pure functions.

Every prompt counts the same in a mean. Differences are taken prompt by prompt, and prompts are what is drawn for their
intervals: what makes a prompt hard for all references cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from laguna_serve.bench.stats.intervals import bootstrap_mean
from laguna_serve.evals.distance.kept import Stretch
from laguna_serve.evals.distance.result import Score, Speed, TokenDistance

Tokens = Sequence[int]


def compare_tokens(baseline: Sequence[Tokens], other: Sequence[Tokens]) -> TokenDistance:
    """Compare the answers to the same prompts, position by position.

    Two empty answers are identical and have no positions; without any position the share is 1.
    """
    pairs = list(zip(baseline, other, strict=True))
    same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
    positions = sum(max(len(ours), len(theirs)) for ours, theirs in pairs)
    return TokenDistance(
        identical=sum(tuple(ours) == tuple(theirs) for ours, theirs in pairs),
        same=same,
        positions=positions,
        share=same / positions if positions else 1.0,
    )


def score(values: Sequence[float], baseline: Sequence[float] | None, seed: int) -> Score:
    """Mean of a reference's values, and of their differences to the baseline's, if it is another one."""
    mean = float(np.mean(values))
    if baseline is None:
        return Score(mean=mean, difference=None, ci95=None, prompts=len(values))
    differences = np.subtract(values, baseline)
    return Score(
        mean=mean,
        difference=float(differences.mean()),
        ci95=bootstrap_mean(differences, seed) if len(differences) > 1 else None,
        prompts=len(values),
    )


def list_scored(tokens: Mapping[str, Sequence[Tokens]]) -> list[int]:
    """List the prompts, by number, to which no reference gave an empty answer."""
    return [number for number, answers in enumerate(zip(*tokens.values(), strict=True)) if all(answers)]


def summarise_speed(stretches: Sequence[Stretch]) -> Speed | None:
    """Sum up what the stretches took; steps only where every one of them counted some."""
    answers = sum(stretch.answers for stretch in stretches)
    seconds = sum(stretch.seconds for stretch in stretches)
    if not answers or not seconds:
        return None
    steps = [stretch.steps for stretch in stretches if stretch.steps is not None]
    return Speed(
        answers=answers,
        steps_per_answer=sum(steps) / answers if len(steps) == len(stretches) else None,
        tokens_per_s=sum(stretch.tokens for stretch in stretches) / seconds,
    )
