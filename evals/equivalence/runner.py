"""Gets both arms' answers to every problem, in one mixed order, keeps them, and grades their programs.

All requests (problem × arm × repeat) are shuffled together from the seed, so that a drift of the machine (heat, another
job) favours neither arm and no repeat. Where memory is too short for both engines at once, one arm follows the other,
and the result says so. Every answer carries its token ids and the log-probabilities of the forward passes that chose
them, as rollouts for training ask for: a divergence is examined as it happened and nothing has to be run again. An
answer ends where the model ends it, so lengths differ. Start endpoints given by URL without prefix caching, or a
repeat is computed on another path than the first.

A request that fails is no answer, and is not tried again within the run: the others go on (an arm that failed
MAX_FAILURES times is given up), no verdict is given, and the same command asks for what is missing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal

import aiohttp

from laguna_serve.bench.arms.arms import ARMS, Arm, ArmSpec
from laguna_serve.bench.certificate.passes import Answers
from laguna_serve.evals.codegen.grading import Grade, Limits, grade
from laguna_serve.evals.equivalence.arms import Arms
from laguna_serve.evals.equivalence.chat_client import ChatClient
from laguna_serve.evals.equivalence.comparison import Case, Comparison
from laguna_serve.evals.equivalence.draft_counts import DraftCounts
from laguna_serve.evals.equivalence.verdict import CONFIRM
from laguna_serve.evals.extraction.worker import read_safely
from laguna_serve.evals.problems import Problem
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.machine.cores import count_cores

# An arm that failed this many requests is given up.
MAX_FAILURES = 5
# Problems that are confirmed at most, the first ones: more cost much and tell little.
MAX_SUSPECTS = 12


@dataclass(frozen=True, slots=True)
class Job:
    """What is compared. `folder` keeps the answers and the engines' logs."""

    specs: Mapping[str, ArmSpec]
    problems: Sequence[Problem]
    form: Literal["chat", "completion"]
    max_tokens: int
    repeats: int
    concurrency: int
    dtype: str
    limits: Limits
    seed: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to get."""

    problem: Problem
    arm: str
    repeat: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.arm}/{self.repeat}/{self.problem.task_id}"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run has so far. `grades`: by task id and program."""

    answers: Answers
    drafts: DraftCounts
    grades: dict[tuple[str, str], Grade]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The comparison of two arms' answers, its confirmation, and the requests that failed.

    `first` is None when answers are missing: `failures` says of each request that failed why. `fresh`: the
    confirmation, where there was something to confirm.
    """

    first: Comparison | None
    fresh: Comparison | None
    failures: Mapping[str, str]
    drafts: DraftCounts
    interleaved: bool


def run(job: Job, progress: Progress) -> Outcome:
    """Get the answers that are missing, compare, and confirm what is suspicious.

    Raises:
        EngineError, EndpointError, OSError: an arm cannot be had, or died; what was answered is kept.
        JailError: programs cannot be run safely here.
    """
    kept = Kept(Answers(job.folder / "answers.jsonl"), DraftCounts(job.folder / "drafts.jsonl"), {})
    first, fresh, repeats = None, None, range(job.repeats)
    with Arms(job.specs, job.folder, progress.say) as arms:
        failures = collect(job, arms, kept, plan(job, job.problems, repeats), progress)
        if not failures:
            first = compare(job, kept, job.problems, repeats, progress)
        if first is not None and not first.list_convictions() and (suspects := first.list_suspects()[:MAX_SUSPECTS]):
            progress.say(f"confirming {len(suspects)} problems that differ: {CONFIRM} more answers of each arm")
            problems = [problem for problem in job.problems if problem.task_id in suspects]
            repeats = range(job.repeats, job.repeats + CONFIRM)
            failures = collect(job, arms, kept, plan(job, problems, repeats), progress)
            if failures:
                first = None
            else:
                fresh = compare(job, kept, problems, repeats, progress, first.noise)
        return Outcome(first, fresh, failures, kept.drafts, arms.interleaved)


def plan(job: Job, problems: Sequence[Problem], repeats: range) -> list[Request]:
    """Every request in the order in which they are sent, whatever is answered already."""
    requests = [Request(problem, arm, repeat) for problem in problems for arm in ARMS for repeat in repeats]
    random.Random(f"{job.seed} {repeats.start}").shuffle(requests)
    return requests


def collect(job: Job, arms: Arms, kept: Kept, requests: Sequence[Request], progress: Progress) -> dict[str, str]:
    """Send the requests that have no answer yet. Returns those that failed, each with the reason."""
    missing = [request for request in requests if request.key not in kept.answers.by_id]
    failures: dict[str, str] = {}
    if len(missing) < len(requests):
        progress.say(f"{len(requests) - len(missing)} of {len(requests)} answers are there")
    if not missing:
        return failures
    for together in arms.take_turns([name for name in ARMS if any(name == request.arm for request in missing)]):
        names = {arm.name for arm in together}
        wanted = [request for request in missing if request.arm in names]
        progress.say(f"asking {' and '.join(sorted(names))} for {len(wanted)} answers")
        failures |= asyncio.run(_send(job, together, wanted, kept, progress))
    return failures


async def _send(
    job: Job, arms: Sequence[Arm], requests: Sequence[Request], kept: Kept, progress: Progress
) -> dict[str, str]:
    by_name = {arm.name: arm for arm in arms}
    failures: dict[str, str] = {}
    failed: Counter[str] = Counter()
    done = 0
    progress.begin()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session())
        clients = {arm.name: await _connect(session, job, arm) for arm in arms}
        await stack.enter_async_context(kept.drafts.watch(session, arms))

        async def work(request: Request) -> None:
            nonlocal done
            if failed[request.arm] >= MAX_FAILURES:
                failures[request.key] = f"not sent: the {request.arm} failed {MAX_FAILURES} times"
                return
            try:
                kept.answers.add(request.key, await clients[request.arm].probe(request.problem.prompt))
            except EndpointError as error:
                failures[request.key] = str(error)
                failed[request.arm] += 1
                await by_name[request.arm].look_for_death()
            done += 1
            progress.step(request.arm, done, len(requests))

        await run_closed_loop(requests, job.concurrency, work)
    return failures


async def _connect(session: aiohttp.ClientSession, job: Job, arm: Arm) -> Client:
    make = ChatClient if job.form == "chat" else Client
    return await arm.connect(session, job.max_tokens, {"ignore_eos": False}, make)


def compare(
    job: Job,
    kept: Kept,
    problems: Sequence[Problem],
    repeats: range,
    progress: Progress,
    least_noise: float = 0.0,
) -> Comparison:
    """Extract and grade the programs of these repeats, and compare all of it."""
    answers = {
        problem.task_id: tuple(
            kept.answers.by_id[Request(problem, arm, repeat).key] for arm in ARMS for repeat in repeats
        )
        for problem in problems
    }
    programs = {
        problem.task_id: tuple(
            read_safely(answer.text, problem, job.form).program for answer in answers[problem.task_id]
        )
        for problem in problems
    }
    grade_all(job, problems, programs, kept.grades, progress)
    cases = [
        Case(task_id, answers[task_id], found, tuple(kept.grades[task_id, program] for program in found))
        for task_id, found in programs.items()
    ]
    return Comparison(cases, job.dtype, least_noise)


def grade_all(
    job: Job,
    problems: Sequence[Problem],
    programs: Mapping[str, Sequence[str]],
    grades: dict[tuple[str, str], Grade],
    progress: Progress,
) -> None:
    """Grade each distinct program of a problem once: a flicker of the grader cannot look like one of the arms."""
    wanted = {(problem.task_id, program): problem for problem in problems for program in programs[problem.task_id]}
    todo = {key: problem for key, problem in wanted.items() if key not in grades}
    progress.say(f"grading {len(todo)} distinct programs")
    progress.begin()
    pool = ThreadPoolExecutor(max_workers=count_cores())
    try:
        found = pool.map(grade, todo.values(), [program for _, program in todo], repeat(job.limits))
        for done, (key, one) in enumerate(zip(todo, found, strict=True), start=1):
            grades[key] = one
            progress.step("grading", done, len(todo))
    finally:
        pool.shutdown(cancel_futures=True)
