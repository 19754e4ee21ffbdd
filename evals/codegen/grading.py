"""Grades a program, or an answer with one in it: passed or not, and the share of tests passed as a dense reward.

There are two verdicts. *Published*: the tests, as they are, came to their end and none failed; figures of it compare
with other harnesses'. *Strict* (`passed`, and the reward): besides, every test had something to check, and the program
reached as many tests and calls as the canonical solution under the same grader, and gave values of a compatible kind
(sandbox/inside/observe.py). What one test is, sandbox/inside/instrument.py says. The share of a program that has not
passed is what it passed ÷ the tests that the canonical solution passes (or, without one, that this program reached), so
that ending early, whether by a crash or on purpose, gains nothing.

Neither an answer nor its program can stop or crash the caller: answers are read by a worker process
(extraction/worker.py), programs run in the sandbox, and both have limits of wall and processor time.
"""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from laguna_serve.evals.codegen.printable import make_printable
from laguna_serve.evals.extraction.worker import read_safely
from laguna_serve.evals.problems.problem import Form, Problem
from laguna_serve.evals.sandbox import JailError, Limits, RunRecord, Trial, run_trial

__all__ = [
    "Baseline",
    "Grade",
    "JailError",
    "Limits",
    "Verdict",
    "find_baseline",
    "grade",
    "grade_answer",
    "grade_base",
    "refuse",
]

DEFAULT_LIMITS = Limits()
OUTPUT_CHARS, DETAIL_CHARS = 200, 900
KEPT_BASELINES = 4096
# A canonical solution that runs out of time on a busy machine says nothing of the problem.
BASELINE_TRIES = 2


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one program.

    `reward`: share of tests passed, 0…1, and 1 only if `passed`, the strict verdict; `published`: the tests' own.
    `status`: "passed"; "weak", as published alone; "failed", a test did; "broken", the program does not load or lacks
    the function; "died", its process ended; "timeout"; "unjudged", a test needs what cannot cross between the
    processes; "fault", of the problem: its canonical solution does not pass its tests, or they do not load.
    `detail`: the first thing that went wrong, printable, in one line. `walls`: those that were up around the program
    (docs/threat-model.md).
    """

    reward: float
    passed: bool
    tests_passed: int
    tests_total: int
    status: str
    detail: str
    published: bool = False
    walls: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth.

    `program`: what was graded; `extracted`: it parses and defines the function; `base`: of a problem with base tests,
    whether it passes those, as published.
    """

    grade: Grade
    program: str
    extracted: bool
    base: bool | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the canonical solution's run says of a problem: its `record` of `tests` tests, or the problem's `fault`."""

    tests: int = 0
    record: RunRecord | None = None
    fault: str = ""


def grade(problem: Problem, program: str, limits: Limits = DEFAULT_LIMITS) -> Grade:
    """Run the problem's tests on a program, in the sandbox. Blocking; may be called from several threads at once.

    Raises:
        JailError: the sandbox could not be set up; says nothing about the program.
    """
    baseline = find_baseline(problem, limits)
    trial = run_trial(problem, program, limits, baseline.record)
    reached = trial.passed + trial.weak + trial.failed + trial.unjudged
    ended = trial.ending == "ended" and not trial.breach
    published = ended and not trial.failed and not trial.unjudged and reached > 0
    if baseline.fault:
        total = max(reached, 1)
        return Grade(0.0, False, trial.passed, total, "fault", _clean(baseline.fault), published, trial.walls)
    if published and not trial.weak and not trial.unmet and trial.passed >= baseline.tests:
        return Grade(1.0, True, trial.passed, trial.passed, "passed", "", True, trial.walls)
    total = max(baseline.tests, reached if trial.passed < reached else reached + 1)
    status, detail = _explain(trial, limits, baseline)
    return Grade(trial.passed / total, False, trial.passed, total, status, _clean(detail), published, trial.walls)


def grade_answer(problem: Problem, answer: str, form: Form, limits: Limits) -> Verdict:
    """Take the program out of an answer and run the tests on it. Blocking; for several threads at once.

    Raises:
        JailError: the sandbox could not be set up; says nothing about the answer.
    """
    found = read_safely(answer, problem, form)
    if found.error:
        return Verdict(refuse(problem, found.error, limits), "", False, False if problem.base_test else None)
    graded = grade(problem, found.program, limits)
    if problem.kind == "value" and graded.passed and not found.defines:
        detail = "expected a value that is written out, got an expression that computes it"
        graded = replace(graded, reward=0.0, passed=False, status="weak", detail=detail)
    return Verdict(graded, found.program, found.defines, grade_base(problem, found.program, graded, limits))


def grade_base(problem: Problem, program: str, graded: Grade, limits: Limits) -> bool | None:
    """Say whether a program passes the base tests, as published.

    None of a problem without; what passes all passes these.

    Raises:
        JailError: see `grade_answer`.
    """
    if not problem.base_test:
        return None
    return graded.published or grade(replace(problem, test=problem.base_test, base_test=""), program, limits).published


def refuse(problem: Problem, detail: str, limits: Limits = DEFAULT_LIMITS) -> Grade:
    """Grade an answer in which there is no program that can be read."""
    return Grade(0.0, False, 0, max(1, find_baseline(problem, limits).tests), "broken", _clean(detail))


_Key = tuple[Problem, Limits]
_baselines: OrderedDict[_Key, Baseline] = OrderedDict()
# Held while a canonical solution runs: several candidates of one problem wait for one run.
_running: WeakValueDictionary[_Key, Any] = WeakValueDictionary()
_lock = threading.Lock()


def find_baseline(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Baseline:
    """How the canonical solution fares, once for each problem; nothing is known without one.

    Raises:
        JailError: see `grade`.
    """
    if problem.canonical_solution is None:
        return Baseline()
    key = (problem, limits)
    with _lock:
        running = _running.setdefault(key, threading.Lock())
    with running:
        with _lock:
            if key in _baselines:
                _baselines.move_to_end(key)
                return _baselines[key]
        baseline, settled = _run_canonical(problem, problem.prompt + problem.canonical_solution, limits)
        if settled:
            with _lock:
                _baselines[key] = baseline
                while len(_baselines) > KEPT_BASELINES:
                    _baselines.popitem(last=False)
    return baseline


def _run_canonical(problem: Problem, program: str, limits: Limits) -> tuple[Baseline, bool]:
    for _ in range(BASELINE_TRIES):
        baseline, settled = _judge_canonical(run_trial(problem, program, limits), limits)
        if settled:
            break
    return baseline, settled


def _judge_canonical(trial: Trial, limits: Limits) -> tuple[Baseline, bool]:
    """Make the baseline, and say whether another run would say the same."""
    tests = trial.passed + trial.weak
    if trial.ending == "ended" and not trial.failed and not trial.unjudged and tests and trial.record is not None:
        return Baseline(trial.record["passed"], trial.record), True
    status, detail = _explain(trial, limits, Baseline())
    text = f"the canonical solution does not pass: {status}: {detail}"
    return Baseline(tests, None, text), trial.ending in ("ended", "broken", "lacks", "fault")


def _explain(trial: Trial, limits: Limits, baseline: Baseline) -> tuple[str, str]:
    """Status and detail of a program that has not passed."""
    if trial.breach:
        return "died", trial.breach
    if trial.timed_out or trial.exit_code == 128 + signal.SIGXCPU or _is_out_of_time(trial):
        return "timeout", f"expected an end within {limits.cpu_s} s of CPU and {limits.wall_s:g} s, got none"
    match trial.ending:
        case "broken" | "fault":
            return trial.ending, trial.detail
        case "lacks":
            return "unjudged", f"cannot be judged: {trial.detail}; let the jail have the package (--packages)"
        case "ended":
            if trial.failed:
                return "failed", trial.detail
            if trial.unjudged:
                return "unjudged", trial.detail
            return "weak", trial.detail or f"expected {max(1, baseline.tests)} tests, got {trial.passed + trial.weak}"
    said = trial.output.decode(errors="replace").strip()[-OUTPUT_CHARS:]
    ended = "" if trial.exit_code is None else f"; exit status {trial.exit_code}"
    return "died", f"{trial.detail or 'the grader was killed'}{ended}" + (f"; it wrote: {said}" if said else "")


def _is_out_of_time(trial: Trial) -> bool:
    """Say whether the CPU time was used up.

    The limit, soft and hard, is one number: the kernel may skip its warning and kill.
    """
    return trial.ending == "gone" and trial.exit_code in (128 + signal.SIGKILL, -signal.SIGKILL, -signal.SIGXCPU)


def _clean(text: str) -> str:
    return make_printable(text[:DETAIL_CHARS])
