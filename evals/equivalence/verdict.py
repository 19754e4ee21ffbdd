"""Judges two arms' answers to the same problems: invariant, or different, or within the engine's own noise.

Answers are compared at four levels: token ids, text, the extracted program, the reward (with passed or not). Every
distinct program of a problem is graded once, so the levels nest: rewards can differ only where programs do. A fifth
count, *unexplained*, takes only those pairs of answers whose tokens part beyond rounding (bench/stats/parity.py's class
"defect"; ties and near ties are explained). Per level, three counts of problems: the baseline parts from itself, the
candidate from itself, and some answer of the one arm from some answer of the other; the last with its 95% upper bound.

The verdict rests on two levels, *unexplained* and *reward*, and on two exact tests of each (exchangeability.py: are
the arms apart, does the candidate scatter more), in two stages. First every problem is answered k times by each arm.
Where that convicts nobody, the problems under suspicion (the arms part, unexplained or in reward) are answered
CONFIRM more times, and only those fresh answers are tested, so that having been picked for looking bad does not count
against a problem. A test convicts at ALPHA ÷ 8, as there are 2 × 2 × 2: an engine compared with itself is called
different in at most 5% of runs, however noisy. A single problem that is consistently apart is convicted by its
confirmation (p = 1/462).

- `invariant`: no answer differs from any other.
- `explained`: tokens differ, at ties and near ties alone, and no reward does.
- `noise`: more differs, but the tests cannot tell it from the engine's own noise, which was seen.
- `unclear`: answers part beyond rounding, too seldom to convict, and the baseline never did so against itself.
- `differs`: a test convicts, or an endpoint reads a prompt as other tokens.

Rounding is measured over the answers of both arms, as in bench/ab.py: verifying several rows at once rounds otherwise
than plain decoding. So an arm that is slightly wrong everywhere widens it (up to bench/stats/parity.py's ceiling):
compare the two `difference_nats`, and ask bench/certify.py, which has a control of the same shape and a test of drift.

Pure; runner.py gets the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import structs

from laguna_serve.bench.stats.intervals import bootstrap_mean
from laguna_serve.evals.equivalence.comparison import (
    LEVELS,
    REWARD,
    TEXT,
    TOKENS,
    UNEXPLAINED,
    Case,
    Comparison,
    name_count,
)
from laguna_serve.evals.equivalence.exchangeability import is_unsteady
from laguna_serve.evals.equivalence.result import Confirmation, DifferenceNats, Judgement, LevelCounts, RewardDifference

INVARIANT, EXPLAINED, NOISE = "invariant", "explained", "noise"
UNCLEAR, DIFFERS, COULD_NOT_TELL = "unclear", "differs", "could not tell"
# More answers of each arm to a problem under suspicion: the fewest with which one problem alone can convict.
CONFIRM = 6


def judge(first: Comparison, fresh: Comparison | None, seed: int) -> Judgement:
    """Verdict, reasons, figures and divergences. `fresh`: the confirmation, where there was one."""
    levels = {level: first.count(level) for level in (*LEVELS, UNEXPLAINED)}
    reasons = [*_find_foreign_prompts(first.cases), *first.list_convictions()]
    if fresh is not None:
        reasons += [f"asked {CONFIRM} more times: {reason}" for reason in fresh.list_convictions()]
    verdict = DIFFERS if reasons else _weigh(levels, fresh)
    if verdict == UNCLEAR:
        reasons.append(
            f"tokens part beyond rounding on {name_count(levels[UNEXPLAINED].across)}, too seldom to tell from noise, "
            "which the baseline did not show; ask for more --repeats or problems"
        )
    return Judgement(
        verdict=verdict,
        reasons=reasons,
        levels=levels,
        confirmation=None if fresh is None else _confirm(fresh),
        rewards=compare_rewards(first.cases, seed),
        noise_nats=first.noise,
        difference_nats=DifferenceNats(any_two=first.difference, one_arm=first.own_difference),
        divergences=first.list_divergences(),
    )


def _confirm(fresh: Comparison) -> Confirmation:
    return Confirmation(
        repeats=CONFIRM,
        problems=[case.task_id for case in fresh.cases],
        # No bound: these were picked for differing.
        levels={level: structs.replace(fresh.count(level), bound95=None) for level in (*LEVELS, UNEXPLAINED)},
    )


def compare_rewards(cases: Sequence[Case], seed: int) -> RewardDifference:
    """Mean reward of each arm, and the candidate's minus the baseline's with its 95% interval.

    Each is the mean over problems of the mean over repeats; the difference is paired, its bootstrap interval over
    problems. An interval of [0, 0] says that none differed.
    """
    means = np.array([[np.mean(rewards) for rewards in case.rewards] for case in cases])
    difference = means[:, 1] - means[:, 0]
    baseline, candidate = means.mean(axis=0)
    return RewardDifference(
        baseline=float(baseline),
        candidate=float(candidate),
        difference=float(difference.mean()),
        ci95=bootstrap_mean(difference, seed),
    )


def _weigh(levels: Mapping[str, LevelCounts], fresh: Comparison | None) -> str:
    if not levels[TOKENS].across and not levels[TEXT].across:
        return INVARIANT
    unexplained = levels[UNEXPLAINED]
    if unexplained.across:
        again = fresh is not None and any(is_unsteady(item, 0) for item in fresh.differ[UNEXPLAINED])
        return NOISE if unexplained.within_baseline or again else UNCLEAR
    return NOISE if levels[REWARD].across else EXPLAINED


def _find_foreign_prompts(cases: Sequence[Case]) -> list[str]:
    count = sum(len({answer.prompt_ids for answer in case.answers}) > 1 for case in cases)
    return [f"the endpoints read the prompts of {name_count(count)} as other tokens than each other"] if count else []
