"""Every pair of answers that two arms give to the same problems, compared at each level (verdict.py has the levels)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from laguna_serve.bench.stats.intervals import bound_mismatch_rate
from laguna_serve.bench.stats.parity import (
    CLASSES,
    Mismatch,
    Verdict,
    classify,
    count_common,
    find_mismatch,
    list_differences,
    measure_noise,
)
from laguna_serve.evals.codegen.grading import Grade
from laguna_serve.evals.equivalence.exchangeability import Bools, find_apart_p, find_scatter_p, is_apart, is_unsteady
from laguna_serve.evals.equivalence.result import ArmRewards, Divergence, LevelCounts, PairShares
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Record

TOKENS, TEXT, PROGRAM, REWARD, UNEXPLAINED = "tokens", "text", "program", "reward", "unexplained"
LEVELS = (TOKENS, TEXT, PROGRAM, REWARD)
# How often an engine compared with itself may be called different, over all tests of a run.
ALPHA = 0.05
TESTS = 8
# Of text around a divergence, in characters.
BEFORE, AFTER = 80, 40


@dataclass(frozen=True, slots=True)
class Case:
    """One problem: the k answers of the baseline, then the k of the candidate, each with its program and grade."""

    task_id: str
    answers: tuple[Probe, ...]
    programs: tuple[str, ...]
    grades: tuple[Grade, ...]

    @property
    def rewards(self) -> tuple[list[float], list[float]]:
        """The baseline's, and the candidate's."""
        repeats, rewards = len(self.grades) // 2, [grade.reward for grade in self.grades]
        return rewards[:repeats], rewards[repeats:]


class Comparison:
    """Every pair of answers to every problem, compared.

    Attributes:
        noise: what rounding can do here, in nats: the larger of `difference` and the spacing of the logits.
        difference: the largest of the log-probabilities of agreeing tokens, between any two answers to a problem.
        own_difference: the same, of answers of one arm alone.
        differ: level → one matrix [2k, 2k] per case.
    """

    def __init__(self, cases: Sequence[Case], dtype: str, least_noise: float = 0.0) -> None:
        self.cases = cases
        self.own_difference = _find_largest(_list_own_pairs(cases))
        self.difference = _find_largest(pair for case in cases for pair in combinations(case.answers, 2))
        self.noise = max(least_noise, self.difference, measure_noise((), dtype))
        self._verdicts = [_classify_pairs(case, self.noise) for case in cases]
        self.differ: dict[str, list[Bools]] = {
            TOKENS: [_compare([answer.token_ids for answer in case.answers]) for case in cases],
            TEXT: [_compare([answer.text for answer in case.answers]) for case in cases],
            PROGRAM: [_compare(case.programs) for case in cases],
            REWARD: [_compare([(grade.reward, grade.passed) for grade in case.grades]) for case in cases],
            UNEXPLAINED: [_mark_defects(*item) for item in zip(cases, self._verdicts, strict=True)],
        }

    def list_suspects(self) -> list[str]:
        """Task ids where the arms part, unexplained or in reward."""
        levels = self.differ[UNEXPLAINED], self.differ[REWARD]
        return [
            case.task_id
            for case, *found in zip(self.cases, *levels, strict=True)
            if any(is_apart(differ) for differ in found)
        ]

    def list_convictions(self) -> list[str]:
        """List what a test convicts the candidate of, a sentence each."""
        found = []
        for level, what in ((UNEXPLAINED, "tokens part beyond rounding"), (REWARD, "rewards differ")):
            differ = self.differ[level]
            if (p := find_apart_p(differ)) <= ALPHA / TESTS:
                found.append(f"{what} on {name_count(_count(differ))}, beyond the engine's own noise (p = {p:.2g})")
            if (p := find_scatter_p(differ)) <= ALPHA / TESTS:
                unsteady = sum(is_unsteady(item, 1) for item in differ)
                found.append(f"{what} between the candidate's own answers to {name_count(unsteady)} (p = {p:.2g})")
        return found

    def count(self, level: str) -> LevelCounts:
        """Compute the figures of a level."""
        differ, repeats = self.differ[level], len(self.cases[0].answers) // 2
        own = repeats * (repeats - 1) * len(differ)
        across = _count(differ)
        pairs = PairShares(
            baseline=sum(int(item[:repeats, :repeats].sum()) for item in differ) / own,
            candidate=sum(int(item[repeats:, repeats:].sum()) for item in differ) / own,
            across=sum(int(item[:repeats, repeats:].sum()) for item in differ) / (repeats**2 * len(differ)),
        )
        return LevelCounts(
            problems=len(differ),
            within_baseline=sum(is_unsteady(item, 0) for item in differ),
            within_candidate=sum(is_unsteady(item, 1) for item in differ),
            across=across,
            bound95=bound_mismatch_rate(across, len(differ)),
            pairs=pairs,
            apart_p=find_apart_p(differ),
            scatter_p=find_scatter_p(differ),
        )

    def list_divergences(self) -> list[Divergence]:
        """One entry per problem with answers that differ: the worst pair of one answer of each arm."""
        entries = []
        for index, case in enumerate(self.cases):
            levels = [level for level in LEVELS if is_apart(self.differ[level][index])]
            if levels:
                entries.append(self._describe(index, case, levels))
        return entries

    def _describe(self, index: int, case: Case, levels: list[str]) -> Divergence:
        repeats = len(case.answers) // 2

        def rank(pair: tuple[int, int]) -> tuple[int, bool, bool]:
            weight = CLASSES.index(self._verdicts[index][pair].classification)
            return weight, bool(self.differ[REWARD][index][pair]), bool(self.differ[PROGRAM][index][pair])

        pairs = [pair for pair in self._verdicts[index] if pair[0] < repeats <= pair[1]]
        first, second = worst = max(pairs, key=rank)
        verdict = self._verdicts[index][worst]
        before, *texts = _cut_context(case.answers[first].text, case.answers[second].text)
        baseline, candidate = case.rewards
        return Divergence(
            task_id=case.task_id,
            levels=levels,
            index=verdict.index,
            classification=verdict.classification,
            reason=verdict.reason,
            baseline_token=verdict.baseline_token,
            candidate_token=verdict.candidate_token,
            # Of the very forward passes that chose the tokens: nothing was run again.
            baseline_top2=verdict.baseline_top2,
            candidate_top2=verdict.candidate_top2,
            baseline_margin=verdict.baseline_margin,
            candidate_margin=verdict.candidate_margin,
            unsteady=[
                name for arm, name in enumerate(("baseline", "candidate")) if is_unsteady(self.differ[TEXT][index], arm)
            ],
            before=before,
            baseline_text=texts[0],
            candidate_text=texts[1],
            rewards=ArmRewards(baseline=baseline, candidate=candidate),
            programs=(case.programs[first], case.programs[second]) if PROGRAM in levels else None,
        )


def _find_largest(pairs: Iterable[tuple[Probe, Probe]]) -> float:
    return max((value for pair in pairs for value in list_differences(*pair)), default=0.0)


def _list_own_pairs(cases: Sequence[Case]) -> Iterator[tuple[Probe, Probe]]:
    for case in cases:
        repeats = len(case.answers) // 2
        yield from combinations(case.answers[:repeats], 2)
        yield from combinations(case.answers[repeats:], 2)


def _classify_pairs(case: Case, noise: float) -> dict[tuple[int, int], Verdict]:
    """Classify every pair i < j of answers whose tokens or text differ."""
    records = [Record(case.task_id, 0, 0, token_ids=list(a.token_ids), text=a.text) for a in case.answers]
    found = {}
    for pair in combinations(range(len(records)), 2):
        left, right = (records[index] for index in pair)
        mismatch: Mismatch | None = find_mismatch(left, right)
        if mismatch is not None:
            probes = case.answers[pair[0]], case.answers[pair[1]]
            found[pair] = classify(mismatch, left, right, probes, noise)
    return found


def _mark_defects(case: Case, verdicts: dict[tuple[int, int], Verdict]) -> Bools:
    differ = np.zeros((len(case.answers), len(case.answers)), dtype=np.bool_)
    for (i, j), verdict in verdicts.items():
        differ[i, j] = differ[j, i] = verdict.classification == "defect"
    return differ


def _compare(values: Sequence[object]) -> Bools:
    return np.array([[left != right for right in values] for left in values], dtype=np.bool_)


def _count(differ: Sequence[Bools]) -> int:
    return sum(is_apart(item) for item in differ)


def name_count(count: int) -> str:
    return f"{count} problem" if count == 1 else f"{count} problems"


def _cut_context(baseline: str, candidate: str) -> tuple[str, str, str]:
    """Cut out what both said before their texts part, and each from there on."""
    common = count_common(baseline, candidate)
    before = baseline[max(0, common - BEFORE) : common]
    return before, baseline[common : common + AFTER], candidate[common : common + AFTER]
