"""The result of a comparison of answers: invariance.json, schema laguna_serve.invariance/1."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, structs

from laguna_serve.evals.codegen.grading import Grade
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.results import JsonObject, to_json

# How many divergences and failures the line on stdout has.
LINE_ITEMS = 3


class Workload(Struct, frozen=True, kw_only=True):
    """What was asked, and how. `walls`: around the programs, while they were graded."""

    problems_file: str
    problems: int
    form: str
    max_tokens: int
    repeats: int
    concurrency: int
    dtype: str
    temperature: float = 0
    seed: int
    walls: str | UnsetType = UNSET
    interleaved: bool


class ComparedArm(Struct, frozen=True, kw_only=True):
    """One arm. `acceptance`: tokens per verification step; None where nothing was drafted."""

    label: str
    acceptance: float | None


class PairShares(Struct, frozen=True, kw_only=True):
    """The shares of pairs of answers that differ: of an arm's own, and of one of each arm."""

    baseline: float
    candidate: float
    across: float


class LevelCounts(Struct, frozen=True, kw_only=True):
    """One level: on how many problems answers differ.

    Attributes:
        within_baseline: problems on which the baseline parts from itself; the next, the candidate from itself.
        across: problems on which some answer of the one arm differs from some of the other.
        bound95: upper bound on their rate.
        apart_p: are the arms apart (exact test)?
        scatter_p: does the candidate scatter more (exact test)?
    """

    problems: int
    within_baseline: int
    within_candidate: int
    across: int
    bound95: float | None
    pairs: PairShares
    apart_p: float
    scatter_p: float


class Confirmation(Struct, frozen=True, kw_only=True):
    """Fresh answers to the problems under suspicion."""

    repeats: int
    problems: list[str]
    levels: dict[str, LevelCounts]


class RewardDifference(Struct, frozen=True, kw_only=True):
    """Mean reward of each arm, and the candidate's minus the baseline's, paired over problems."""

    baseline: float
    candidate: float
    difference: float
    ci95: tuple[float, float]


class DifferenceNats(Struct, frozen=True, kw_only=True):
    """The largest difference of log-probabilities of agreeing tokens, between any two answers and within one arm."""

    any_two: float
    one_arm: float


class ArmRewards(Struct, frozen=True, kw_only=True):
    """A problem's rewards, repeat by repeat."""

    baseline: list[float]
    candidate: list[float]


class Divergence(Struct, frozen=True, kw_only=True):
    """A problem with answers that differ: the worst pair of one answer of each arm.

    Attributes:
        levels: at which the arms differ.
        index: of the token at which they part; None where only the text does. The fields up to `candidate_margin` are
            parity.Verdict's.
        unsteady: arms that part from themselves, too.
        before: the text that both share at the end; the next two, how each goes on.
        programs: of both, where they differ.
    """

    task_id: str
    levels: list[str]
    index: int | None
    classification: str
    reason: str
    baseline_token: int | None
    candidate_token: int | None
    baseline_top2: list[tuple[int, float]] | None
    candidate_top2: list[tuple[int, float]] | None
    baseline_margin: float | None
    candidate_margin: float | None
    unsteady: list[str]
    before: str
    baseline_text: str
    candidate_text: str
    rewards: ArmRewards
    programs: tuple[str, str] | UnsetType | None


class ComparedProblem(Struct, frozen=True, kw_only=True):
    """One problem: lengths and grades of all answers, the baseline's first."""

    task_id: str
    tokens: list[int]
    grades: list[Grade]


class Judgement(Struct, frozen=True, kw_only=True):
    """What verdict.py makes of the answers."""

    verdict: str
    reasons: list[str]
    levels: dict[str, LevelCounts]
    confirmation: Confirmation | None
    rewards: RewardDifference
    noise_nats: float
    difference_nats: DifferenceNats
    divergences: list[Divergence]


class InvarianceResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.invariance/1"):
    """invariance.json. Where requests failed there are `failures` (request → reason), and no figures."""

    verdict: str
    reasons: list[str]
    environment: Environment
    workload: Workload
    arms: dict[str, ComparedArm]
    failures: dict[str, str] | UnsetType = UNSET
    levels: dict[str, LevelCounts] | UnsetType = UNSET
    confirmation: Confirmation | UnsetType | None = UNSET
    rewards: RewardDifference | UnsetType = UNSET
    noise_nats: float | UnsetType = UNSET
    difference_nats: DifferenceNats | UnsetType = UNSET
    divergences: list[Divergence] | UnsetType = UNSET
    problems: list[ComparedProblem]


def shorten(result: InvarianceResult) -> JsonObject:
    """Leave the long lists out of a result, for one line; `levels` counts what they hold."""
    divergences = [structs.replace(item, programs=UNSET) for item in (result.divergences or [])[:LINE_ITEMS]]
    failures = dict(list((result.failures or {}).items())[:LINE_ITEMS])
    short = structs.replace(
        result,
        problems=[],
        divergences=UNSET if result.divergences is UNSET else divergences,
        failures=UNSET if result.failures is UNSET else failures,
    )
    return {name: value for name, value in to_json(short).items() if name != "problems"}
