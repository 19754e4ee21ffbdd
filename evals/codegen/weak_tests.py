"""Finds the problems that answers which say nothing can pass: constants, empty values, NaN, identity, exceptions, ….

Such a problem measures little and teaches a policy the wrong thing, so it is named before anything is asked. Two
verdicts, as of a program (grading.py): what the tests as published let pass, and what is left in the strict sense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from laguna_serve.evals.codegen.grading import find_baseline
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import Limits, run_trial
from laguna_serve.serving.machine.cores import count_cores

PROBE_WALL_S = 120.0
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Weakness:
    """The universal wrong answers that pass one problem's tests, `published` and `strict`.

    `fault`: why its canonical solution does not pass, or empty.
    """

    task_id: str
    published: tuple[str, ...]
    strict: tuple[str, ...]
    fault: str = ""


def find_weakness(problem: Problem, limits: Limits) -> Weakness:
    """Try every universal wrong answer on one problem.

    Of evalplus's first on the base tests, which are few: an answer that fails one of them passes neither verdict.

    Raises:
        JailError: the sandbox could not be set up.
    """
    baseline = find_baseline(problem, limits)
    if problem.base_test and not baseline.fault:
        base = find_weakness(replace(problem, test=problem.base_test, base_test=""), limits)
        if not base.published and not base.fault:
            return base
    trial = run_trial(problem, "", replace(limits, wall_s=PROBE_WALL_S), baseline.record, probes=True)
    found = trial.probes or {}
    passed = [tuple(name for name, verdicts in found.items() if verdicts[index]) for index in (0, 1)]
    fault = baseline.fault or ("" if trial.probes is not None else f"its tests do not run: {trial.detail}")
    return Weakness(problem.task_id, passed[0], passed[1] if not baseline.fault else (), fault)


def find_weaknesses(problems: Sequence[Problem], limits: Limits, report: Callable[[int, int], None]) -> list[Weakness]:
    """Every problem's, in order. `report` gets (done, total) after each."""
    found = []
    with ThreadPoolExecutor(count_cores()) as pool:
        for weakness in pool.map(lambda problem: find_weakness(problem, limits), problems):
            found.append(weakness)
            report(len(found), len(problems))
    return found


def tell_weaknesses(found: Sequence[Weakness]) -> list[str]:
    """Describe weak tests in lines: a sentence on all of them, then a line for each problem that is concerned."""
    published = [weakness for weakness in found if weakness.published]
    strict = [weakness for weakness in found if weakness.strict]
    faults = [weakness for weakness in found if weakness.fault]
    lines = [
        f"universal wrong answers pass {len(published)} of {len(found)} problems as published, {len(strict)} strictly"
    ]
    lines += [f"  {item.task_id}: as published by {_list(item.published)}" for item in published if not item.strict]
    lines += [f"  {item.task_id}: even strictly by {_list(item.strict)}" for item in strict]
    lines += [f"  {item.task_id}: fault of the problem: {item.fault}" for item in faults]
    return lines


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
