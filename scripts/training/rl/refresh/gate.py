"""Is a new drafter no worse than the serving one? A paired test over prompts, on drafter/held_out.py's exact count.

Every prompt has the expected steps S and accepted drafts A of either drafter along the same answers; a drafter's
acceptance there is A ÷ S. With d = new − (1 − MARGIN) · serving over the prompts, Student's one-sided t-test asks
whether d is above 0: if so, the new one is no worse than the serving one by more than the margin. It is pushed if that
is shown at ALPHA and its mean acceptance is higher. Answers to one prompt are not independent; prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]  # [answers, 1 + γ]: steps, and those that accepted at least 1 … γ drafts

# Share of the serving drafter's acceptance; level of the test; fewest prompts that are judged by.
MARGIN, ALPHA, LEAST_PROMPTS = 0.02, 0.05, 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the gate; `p_worse` None where there was nothing to test, `reason` None where the drafter passes."""

    serving_tau: float
    candidate_tau: float
    p_worse: float | None
    prompts: int
    reason: str | None

    @property
    def passes(self) -> bool:
        """The candidate is to be pushed."""
        return self.reason is None


def judge(serving: Counts, candidate: Counts, prompts: Sequence[object]) -> Verdict:
    """Hold a candidate against the serving drafter: counts of the same answers, and the prompt of each."""
    from scipy.stats import ttest_rel  # half a second to import

    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    pairs = [(find_accepted(serving[rows]), find_accepted(candidate[rows])) for rows in groups.values()]
    both = np.array([(old, new) for old, new in pairs if old is not None and new is not None]).reshape(-1, 2)
    old, new = both[:, 0], both[:, 1]
    taus = 1 + (find_accepted(serving) or 0.0), 1 + (find_accepted(candidate) or 0.0)
    if len(both) < LEAST_PROMPTS:
        return Verdict(*taus, None, len(both), f"{len(both)} prompts to judge by, {LEAST_PROMPTS} are the least")
    p = float(ttest_rel(new, (1 - MARGIN) * old, alternative="greater").pvalue)
    reason = None
    if not new.mean() > old.mean():
        reason = "accepted no more than the serving one"
    elif not p < ALPHA:  # NaN, of equal differences, shows nothing either
        reason = f"not shown to be less than {MARGIN:.0%} worse"
    return Verdict(*taus, None if np.isnan(p) else p, len(both), reason)


def find_accepted(counts: Counts) -> float | None:
    """Find the accepted drafts per step of some answers; None without a step."""
    total = counts.sum(axis=0)
    return float(total[1:].sum() / total[0]) if len(counts) and total[0] > 0 else None
