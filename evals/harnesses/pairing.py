"""Two models on the same questions: which of them one alone got right, and whether that could be chance.

Intervals of two scores that overlap say little about models that answered the same questions: what they share cancels.
A question that both got right, or both wrong, says nothing of the difference; under the hypothesis that there is none,
each of the others is as likely to be either's. The test is exact (a two-sided binomial one) and takes questions as
independent. With several samples of a question the share that passes is compared: a sign test then.

Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions or percentages; Holm
1979, A simple sequentially rejective multiple test procedure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct, structs
from scipy.stats import binomtest

from laguna_serve.bench.stats.two_sample import adjust
from laguna_serve.evals.harnesses.logged_samples import Outcomes
from laguna_serve.evals.harnesses.results import Score


class Pair(Struct, frozen=True, kw_only=True):
    """A column against the first one whose questions are known, on those that both were asked.

    Attributes:
        questions: that both were asked.
        better: those on which the candidate did better; `worse`: those on which it did worse.
        p: two-sided, of this row alone.
        p_holm: with all pairs of the table taken into account.
    """

    suite: str
    metric: str
    baseline: str
    candidate: str
    questions: int
    better: int
    worse: int
    p: float
    p_holm: float


def pair(rows: Mapping[tuple[str, str], Mapping[str, Score]]) -> list[Pair]:
    """Pair the columns of every row, (suite, metric) → column → score, where single questions' outcomes are there."""
    pairs = [found for (suite, metric), scores in rows.items() for found in _pair_row(suite, metric, scores)]
    adjusted = adjust([found.p for found in pairs])
    return [structs.replace(found, p_holm=p) for found, p in zip(pairs, adjusted, strict=True)]


def _pair_row(suite: str, metric: str, scores: Mapping[str, Score]) -> Iterator[Pair]:
    if len(scores) < 2:
        return
    known = {column: outcomes for column, score in scores.items() if (outcomes := score.read_outcomes())}
    baseline, *others = known or [""]
    for candidate in others:
        better, worse, questions = _count(known[baseline], known[candidate])
        if questions:
            p = find_p(better, worse)
            yield Pair(
                suite=suite,
                metric=metric,
                baseline=baseline,
                candidate=candidate,
                questions=questions,
                better=better,
                worse=worse,
                p=p,
                p_holm=p,
            )


def _count(baseline: Outcomes, candidate: Outcomes) -> tuple[int, int, int]:
    shared = baseline.keys() & candidate.keys()
    better = sum(candidate[question] > baseline[question] for question in shared)
    worse = sum(candidate[question] < baseline[question] for question in shared)
    return better, worse, len(shared)


def find_p(better: int, worse: int) -> float:
    """Find the exact two-sided p-value of so many questions better and worse (McNemar)."""
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def render_pairs(pairs: Sequence[Pair], marks: Mapping[tuple[str, str], str]) -> list[str]:
    """Render a line for each; `marks`: what a row's metric is followed by, as in the table."""
    return [
        f"{one.suite}, {one.metric}{marks[one.suite, one.metric]}: "
        f"{one.candidate} against {one.baseline}, {one.questions} questions of both: "
        f"{one.better} better, {one.worse} worse, p {one.p:.2g} ({one.p_holm:.2g} with all of these, Holm)"
        for one in pairs
    ]
