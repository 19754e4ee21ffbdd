"""Do two sets of sampled completions come from one distribution? A permutation test on the tree of their prefixes.

For one prompt, let a(v) and b(v) count the completions of each set that begin with the tokens v. The statistic is
Σ (a − b)² ÷ (a + b) over all prefixes v (homogeneity as in Pearson's test, of every position given what came before
it); its null distribution comes from dealing the pooled completions out again. Prefixes seen fewer than RARE times in
both sets together are left out: they carry noise alone. Over prompts there are two answers, both valid at any sample
size: the prompts' own p-values, corrected by Holm's method, and one p-value of the sum over prompts, which finds small
shifts that all prompts share.

Ours, on NumPy, as scipy has neither the statistic, nor a permutation test that deals all prompts alike with one matrix
product (scipy.stats.permutation_test calls a Python function per deal), nor Holm's correction. Permutation test: Good,
Permutation Tests, 2nd ed. 2000; Holm, Scand. J. Statist. 6 (1979) 65.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RARE = 10
Completion = tuple[int, ...]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`p_values`, one per prompt, and Holm's adjusted ones; `pooled_p`: of the sum over prompts."""

    p_values: list[float]
    adjusted: list[float]
    pooled_p: float

    @property
    def least(self) -> float:
        """The p-value of the whole comparison: Bonferroni over the two answers."""
        return min(1.0, 2 * min(self.pooled_p, *self.adjusted))


def compare(
    baseline: Sequence[Sequence[Completion]],
    candidate: Sequence[Sequence[Completion]],
    rng: np.random.Generator,
    permutations: int,
) -> Comparison:
    """Test two arms. `baseline[i]` and `candidate[i]` are the completions of prompt i, of equal number."""
    size = len(baseline[0])
    if any(len(completions) != size for completions in (*baseline, *candidate)):
        lengths = sorted({len(completions) for completions in (*baseline, *candidate)})
        raise ValueError(f"completions: expected equally many of every prompt on both arms, got {lengths}")
    deals = _deal(size, rng, permutations)
    statistics = [_score([*left, *right], deals) for left, right in zip(baseline, candidate, strict=True)]
    p_values = [_rank(scores) for scores in statistics]
    return Comparison(p_values, adjust(p_values), _rank(np.sum(statistics, axis=0)))


def adjust(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def sharpen(completions: Sequence[Completion], share: float, rng: np.random.Generator) -> list[Completion]:
    """Do what a speculative bug would: replace so large a share of completions by the prompt's most frequent one.

    It happens when drafts are accepted too readily.
    """
    likeliest = Counter(completions).most_common(1)[0][0]
    return [
        likeliest if chance < share else c for c, chance in zip(completions, rng.random(len(completions)), strict=True)
    ]


def find_power(
    pool: Sequence[Sequence[Completion]],
    share: float,
    level: float,
    rng: np.random.Generator,
    *,
    trials: int,
    permutations: int,
) -> float:
    """Share of simulated arms, drawn from each prompt's `pool` and sharpened, that the test finds to differ."""
    detected = 0
    for _ in range(trials):
        sound, wrong = [], []
        for completions in pool:
            order = rng.permutation(len(completions))
            half = len(completions) // 2
            sound.append([completions[i] for i in order[:half]])
            wrong.append(sharpen([completions[i] for i in order[half : 2 * half]], share, rng))
        detected += compare(sound, wrong, rng, permutations).least <= level
    return detected / trials


def _deal(size: int, rng: np.random.Generator, permutations: int) -> npt.NDArray[np.float32]:
    """[permutations + 1, 2 · size] of 1 for the first set and 0 for the second, the deal that was seen first.

    The others are random. All prompts share them, which permutes every prompt alike: as good a group, and much less to
    draw.
    """
    deals = np.zeros((permutations + 1, 2 * size), dtype=np.float32)
    deals[0, :size] = 1
    for row in deals[1:]:
        row[rng.permutation(2 * size)[:size]] = 1
    return deals


def _score(completions: Sequence[Completion], deals: npt.NDArray[np.float32]) -> Floats:
    """Compute the statistic [deals] of one prompt."""
    members = _tabulate(completions)
    total = members.sum(axis=0, dtype=np.float64)
    counts = (deals @ members).astype(np.float64)
    scores: Floats = ((2 * counts - total) ** 2 / total).sum(axis=1)
    return scores


def _tabulate(completions: Sequence[Completion]) -> npt.NDArray[np.float32]:
    """[completions, prefixes] of 0 and 1: who begins with what. Rare prefixes are left out."""
    counts = Counter(c[:length] for c in completions for length in range(1, len(c) + 1))
    columns = {prefix: i for i, prefix in enumerate(p for p, count in counts.items() if count >= RARE)}
    table = np.zeros((len(completions), len(columns)), dtype=np.float32)
    for row, completion in enumerate(completions):
        for length in range(1, len(completion) + 1):
            if (column := columns.get(completion[:length])) is not None:
                table[row, column] = 1
    return table


def _rank(statistics: Floats) -> float:
    """Compute the permutation p-value of the first one, itself counted among them; rounding must not break a tie."""
    return float(np.count_nonzero(statistics >= statistics[0] * (1 - 1e-12)) / len(statistics))
