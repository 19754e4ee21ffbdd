"""The result of an evaluation on code problems: code_tasks.json, schema laguna_serve.code_tasks/1, and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from msgspec import UNSET, Struct, UnsetType, structs

from laguna_serve.evals.codegen.pass_at_k import Estimate, average, average_pass_at_k
from laguna_serve.evals.codegen.runner import Sample, Workload
from laguna_serve.evals.codegen.weak_tests import Weakness
from laguna_serve.evals.sandbox import Limits
from laguna_serve.serving.kit.environment import Environment

# Statuses that say nothing of the program (grading.py).
NOT_JUDGED = ("unjudged", "fault")
WITHHELD = ("pass_at_k", "published_pass_at_k", "reward")


class FileDigest(Struct, frozen=True):
    """A file by its name and what is in it, wherever it lies."""

    name: str
    sha256: str


class ProblemsFile(FileDigest, frozen=True):
    """A problems file, and which problems of it were asked."""

    split: str | None = None
    limit: int | None = None
    only: list[str] | None = None


class Refused(Struct, frozen=True):
    """A figure that is withheld, and why."""

    figure: str
    reason: str


class ProblemRow(Struct, frozen=True, kw_only=True):
    """One problem: how many of its samples pass, strictly, as the published tests say, and of the base tests.

    Attributes:
        reward: mean share of tests passed; None without a graded sample.
        detail: what went wrong in the first one that does not pass.
    """

    task_id: str
    samples: int
    base: int | UnsetType = UNSET
    graded: int
    passed: int
    published: int | UnsetType = UNSET
    reward: float | None
    statuses: dict[str, int]
    detail: str


class Asked(Struct, frozen=True, kw_only=True):
    """What was asked of whom.

    Attributes:
        root: where the endpoint says that the model was loaded from; None where it does not.
        weak_problems: those that universal wrong answers pass; None where not looked for.
    """

    environment: Environment
    base_url: str
    model: str
    root: str | None = None
    problems_file: str
    file: ProblemsFile | None = None
    prompt_file: FileDigest | None = None
    workload: Workload
    limits: Limits
    weak_problems: list[Weakness] | None = None


class CodeTasksResult(Asked, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.code_tasks/1"):
    """code_tasks.json: what was asked, and what came of it.

    Attributes:
        pass_at_k: k → in the strict sense; the next as the published tests say, `base_pass_at_k` of the base tests.
        not_judged: samples whose status says nothing of the program; counted as not passed.
        walls: those that were up around programs → how many programs.
        truncated: answers cut off at max_tokens.
        versions: which weights answered, by the endpoint's headers, and how many samples.
    """

    pass_at_k: dict[str, Estimate] | None
    published_pass_at_k: dict[str, Estimate] | None = None
    reward: Estimate | None
    refused: list[Refused]
    base_pass_at_k: dict[str, Estimate] | UnsetType = UNSET
    statuses: dict[str, int]
    not_judged: int = 0
    walls: dict[str, int] = {}
    failed_requests: int
    truncated: int
    versions: list[dict[str, str | int]]
    problems: list[ProblemRow]


def summarise(asked: Asked, samples: Sequence[Sample], ks: Sequence[int]) -> CodeTasksResult:
    """Summarise all samples, in the problems' order.

    Figures are withheld (None, with the reason in `refused`) while an answer is missing: a request that failed is
    neither passed nor failed.
    """
    groups = [(task_id, list(group)) for task_id, group in groupby(samples, key=lambda sample: sample.task_id)]
    rows = [_make_row(task_id, group) for task_id, group in groups]
    grades = [sample.graded for sample in samples if sample.graded is not None]
    errors = [sample.answer.error for sample in samples if sample.graded is None]
    withheld: list[Refused] = []
    if errors:
        reason = f"{len(errors)} of {len(samples)} requests failed, one with {errors[0]}; the same command asks again"
        withheld = [Refused(figure, reason) for figure in WITHHELD]

    def average_at(passed: Sequence[int]) -> dict[str, Estimate] | None:
        counts = [(row.samples, count) for row, count in zip(rows, passed, strict=True)]
        return None if errors else {str(k): average_pass_at_k(counts, k) for k in ks}

    has_base = any(sample.graded is not None and sample.graded.base is not None for sample in samples)
    of_base = average_at([row.base or 0 for row in rows]) if has_base else None
    versions = Counter(tuple(sample.answer.versions.items()) for sample in samples if sample.graded)
    return CodeTasksResult(
        **structs.asdict(asked),
        pass_at_k=average_at([row.passed for row in rows]),
        published_pass_at_k=average_at([row.published or 0 for row in rows]),
        reward=None if errors else average([row.reward or 0.0 for row in rows]),
        refused=withheld,
        base_pass_at_k=UNSET if of_base is None else of_base,
        statuses=dict(Counter(grade.status for grade in grades)),
        not_judged=sum(grade.status in NOT_JUDGED for grade in grades),
        walls=dict(Counter(grade.walls for grade in grades if grade.walls)),
        failed_requests=len(errors),
        truncated=sum(sample.answer.finish_reason == "length" for sample in samples),
        versions=[{**dict(named), "samples": count} for named, count in versions.items() if named],
        problems=rows,
    )


def _make_row(task_id: str, group: Sequence[Sample]) -> ProblemRow:
    graded = [sample.graded for sample in group if sample.graded is not None]
    worst = next((grade for grade in graded if not grade.passed), None)
    has_base = bool(graded) and graded[0].base is not None
    return ProblemRow(
        task_id=task_id,
        samples=len(group),
        base=sum(bool(grade.base) for grade in graded) if has_base else UNSET,
        graded=len(graded),
        passed=sum(grade.passed for grade in graded),
        published=sum(grade.published for grade in graded),
        reward=sum(grade.reward for grade in graded) / len(graded) if graded else None,
        statuses=dict(Counter(grade.status for grade in graded)),
        detail=worst.detail if worst else "",
    )
