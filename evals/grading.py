"""Grades a program against a problem's tests: passed or not, and the share of tests passed as a dense reward.

A program has passed when `check` came to its end and no test failed. What one test is, sandbox_judge.py says. The share
of one that has not passed is what it passed ÷ the tests that the canonical solution passes on the same problem (or,
without one, that this program reached), so that ending early, whether by a crash or on purpose, gains nothing.
"""

from __future__ import annotations

import functools
import signal
from dataclasses import dataclass

from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import JailError, Limits, Trial, run_trial

__all__ = ["Grade", "JailError", "Limits", "grade"]

DEFAULT_LIMITS = Limits()
OUTPUT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one program.

    `reward`: share of tests passed, 0…1, and 1 only if `passed`. `status`: "passed"; "failed", a test did; "broken",
    the program does not load or lacks the function; "died", its process ended; "timeout". `detail`: the first failure.
    """

    reward: float
    passed: bool
    tests_passed: int
    tests_total: int
    status: str
    detail: str


def grade(problem: Problem, program: str, limits: Limits = DEFAULT_LIMITS) -> Grade:
    """Run the problem's tests on a program, in the sandbox. Blocking; may be called from several threads at once.

    Raises:
        JailError: the sandbox could not be set up; says nothing about the program.
    """
    trial = run_trial(problem, program, limits)
    if trial.ending == "ended" and not trial.failed:
        total = max(trial.passed, 1)  # a check without tests that came to its end
        return Grade(1.0, True, total, total, "passed", "")
    total = max(count_tests(problem, limits), trial.passed + max(trial.failed, 1))
    return Grade(trial.passed / total, False, trial.passed, total, *_explain(trial, limits))


@functools.lru_cache(maxsize=4096)
def count_tests(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> int:
    """How many tests the canonical solution passes; 0 without one."""
    if problem.canonical_solution is None:
        return 0
    return run_trial(problem, problem.prompt + problem.canonical_solution, limits).passed


def _explain(trial: Trial, limits: Limits) -> tuple[str, str]:
    """Status and detail of a program that has not passed."""
    if trial.timed_out or trial.exit_code == 128 + signal.SIGXCPU or _is_out_of_time(trial):
        return "timeout", f"expected an end within {limits.cpu_s} s of CPU and {limits.wall_s:g} s, got none"
    if trial.ending == "broken":
        return "broken", trial.detail
    if trial.ending == "ended":
        return "failed", trial.detail
    said = trial.output.decode(errors="replace").strip()[-OUTPUT_CHARS:]
    ended = "" if trial.exit_code is None else f"; exit status {trial.exit_code}"
    return "died", f"{trial.detail or 'the judge was killed'}{ended}" + (f"; it wrote: {said}" if said else "")


def _is_out_of_time(trial: Trial) -> bool:
    """The CPU limit, soft and hard, is one number: the kernel may skip its warning and kill."""
    return trial.ending == "gone" and trial.exit_code in (128 + signal.SIGKILL, -signal.SIGKILL, -signal.SIGXCPU)
