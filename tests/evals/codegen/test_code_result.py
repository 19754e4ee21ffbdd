"""The figures of an evaluation on code, of samples that are written out by hand."""

from __future__ import annotations

import pytest

from laguna_serve.evals.codegen.result import WITHHELD, Asked, summarise
from laguna_serve.evals.codegen.runner import Sample, Workload
from laguna_serve.evals.codegen.samples import AnswerLine, GradeLine
from laguna_serve.evals.sandbox import Limits
from laguna_serve.serving.kit.environment import Environment

ASKED = Asked(
    environment=Environment(date="2026-01-01", command="code_tasks"),
    base_url="http://127.0.0.1:9",
    model="m",
    problems_file="problems.jsonl",
    workload=Workload(samples=2),
    limits=Limits(),
)


def make_sample(task_id: str, sample: int, status: str, version: str = "1", finish_reason: str = "stop") -> Sample:
    """A sample with a grade of this status; its answer is from weights of this version."""
    answer = AnswerLine(
        task_id=task_id, sample=sample, text="x", finish_reason=finish_reason, versions={"x-weight-version": version}
    )
    grade = GradeLine(
        task_id=task_id,
        sample=sample,
        reward=1.0 if status == "passed" else 0.5,
        passed=status == "passed",
        tests_passed=1,
        tests_total=2,
        status=status,
        detail="" if status == "passed" else f"why it is {status}",
        published=status in ("passed", "weak"),
        walls="namespaces",
    )
    return Sample(answer, grade)


def test_what_says_nothing_of_a_program_is_counted_apart() -> None:
    """Such samples count as not passed, and readers must see how many there are."""
    statuses = ("passed", "unjudged", "fault", "failed", "weak", "failed")
    result = summarise(ASKED, [make_sample(f"t{n // 2}", n % 2, status) for n, status in enumerate(statuses)], (1, 2))
    assert result.not_judged == 2
    assert result.statuses == {"passed": 1, "unjudged": 1, "fault": 1, "failed": 2, "weak": 1}
    assert result.pass_at_k is not None
    assert {k: estimate.point for k, estimate in result.pass_at_k.items()} == pytest.approx({"1": 1 / 6, "2": 1 / 3})
    assert result.published_pass_at_k is not None
    assert result.published_pass_at_k["1"].point == pytest.approx(1 / 3)
    assert result.reward is not None
    assert result.reward.point == pytest.approx(3.5 / 6)
    first = result.problems[0]
    assert (first.task_id, first.samples, first.graded, first.passed, first.reward) == ("t0", 2, 2, 1, 0.75)
    assert first.detail == "why it is unjudged"
    assert result.walls == {"namespaces": 6}


def test_failed_request_withholds_the_figures_and_says_why() -> None:
    failed = Sample(AnswerLine(task_id="t0", sample=1, error="HTTP 500"), None)
    result = summarise(ASKED, [make_sample("t0", 0, "passed"), failed], (1,))
    assert (result.pass_at_k, result.published_pass_at_k, result.reward) == (None, None, None)
    assert [refused.figure for refused in result.refused] == [*WITHHELD]
    assert result.refused[0].reason == "1 of 2 requests failed, one with HTTP 500; the same command asks again"
    assert (result.failed_requests, result.problems[0].samples, result.problems[0].graded) == (1, 2, 1)


def test_versions_and_answers_that_were_cut_off_are_counted() -> None:
    samples = [
        make_sample("t0", 0, "passed", "1"),
        make_sample("t0", 1, "passed", "2", "length"),
        make_sample("t1", 0, "failed", "2"),
    ]
    result = summarise(ASKED, samples, (1,))
    assert result.versions == [{"x-weight-version": "1", "samples": 1}, {"x-weight-version": "2", "samples": 2}]
    assert result.truncated == 1
