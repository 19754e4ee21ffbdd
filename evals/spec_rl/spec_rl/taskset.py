"""Problems in HumanEval's schema as tasks: what the model is asked, and the reward of its answer.

The reward is dense: the share of a problem's tests that pass. Model-written code runs in the sandbox of
laguna_serve.evals.codegen.grading and nowhere else; grading waits in threads, so that rollouts in flight go on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self, TypeVar

import verifiers.v1 as vf
from pydantic import Field, model_validator

from laguna_serve.evals.codegen import (
    HELD_OUT_SHARE,
    SHIPPED,
    Kind,
    Limits,
    Problem,
    Verdict,
    Wanted,
    choose_walls,
    grade,
    grade_answer,
    load_problems,
    make_prompt,
    split_problems,
)
from laguna_serve.serving.machine.cores import count_cores

DEFAULT_LIMITS = Limits()
Judged = TypeVar("Judged")


class SpecRlData(vf.TaskData):
    """One problem.

    `id` is its task id, `prompt` the question, `stub` the unfinished program in it, `kind` what an answer is: a
    function, or the value that an assertion lacks (CRUXEval).
    """

    stub: str
    entry_point: str
    test: str
    canonical_solution: str | None = None
    open_ended: bool = False
    kind: Kind = "function"

    @property
    def problem(self) -> Problem:
        """The problem in the form that extraction and grading take."""
        fields = (self.stub, self.entry_point, self.test, self.canonical_solution, self.open_ended)
        return Problem(self.id or "", *fields, kind=self.kind)


class SpecRlTaskConfig(vf.TaskConfig):
    """How answers are graded."""

    cpu_s: int = Field(DEFAULT_LIMITS.cpu_s, ge=1)
    """CPU seconds that an answer gets for all of its tests; those that are left then have failed."""
    wall_s: float = Field(DEFAULT_LIMITS.wall_s, gt=0)
    """The same by the clock, for answers that wait."""
    walls: Wanted = "auto"
    """What keeps answers from your files and processes: namespaces, bubblewrap or landlock; auto, the first that works
    here, and no reward where none does. "none" gives rewards all the same, which an answer can forge: for throwaway
    machines."""
    packages: tuple[str, ...] = ()
    """Installed packages that an answer may import, as ["numpy"]; numpy wants memory_mib of 1024 or more."""
    memory_mib: int = Field(DEFAULT_LIMITS.memory_bytes >> 20, ge=64)
    """MiB of address space that an answer gets."""
    grading_workers: int = Field(count_cores(), ge=1)
    """Answers graded at a time, per process of verifiers."""


class SpecRlTask(vf.Task[SpecRlData, vf.State, SpecRlTaskConfig]):
    """One problem with its tests."""

    @property
    def key(self) -> str:
        """The task id: unlike the hash it stays when the wording of a prompt changes."""
        return self.data.id or self.hash

    @vf.reward
    async def tests_passed(self, trace: vf.Trace) -> float:
        """The share of the tests that pass, 0 to 1. Metrics without weight and `trace.info["grade"]` say more."""
        # Not trace.last_reply: it is stripped, and an answer that is a function's body begins with its indentation.
        answer = (trace.assistant_messages[-1].content or "") if trace.assistant_messages else ""
        verdict = await self._in_thread(_grade_chat, answer)
        found = verdict.grade
        shares = {"passed": found.passed, "published": found.published, "extracted": verdict.extracted}
        judged = found.status not in ("unjudged", "fault")
        trace.record_metrics({name: float(value) for name, value in (shares | {"judged": judged}).items()})
        counts = {"tests_passed": found.tests_passed, "tests_total": found.tests_total}
        trace.info["grade"] = {"status": found.status, "detail": found.detail, "walls": found.walls, **counts}
        return found.reward

    async def validate(self, runtime: vf.Runtime) -> bool | None:
        """Say whether the canonical solution passes; None where the problem has none."""
        if self.data.canonical_solution is None:
            return None
        found = await self._in_thread(grade, self.data.stub + self.data.canonical_solution)
        return found.passed

    async def _in_thread(self, judge: Callable[[Problem, str, Limits], Judged], text: str) -> Judged:
        pool = _pool(self.config.grading_workers)
        config = self.config
        limits = Limits(
            cpu_s=config.cpu_s,
            wall_s=config.wall_s,
            memory_bytes=config.memory_mib << 20,
            walls=await asyncio.to_thread(choose_walls, config.walls),
            packages=config.packages,
        )
        return await asyncio.get_running_loop().run_in_executor(pool, judge, self.data.problem, text, limits)


class SpecRlConfig(vf.TasksetConfig):
    """Which problems are asked."""

    problems: Path = SHIPPED
    """JSON Lines in HumanEval's schema, .jsonl or .jsonl.gz."""
    split: Literal["train", "held_out", "all"] = "train"
    """A problem's side depends on its task id and `split_seed` alone."""
    held_out_share: float = Field(HELD_OUT_SHARE, gt=0, lt=1)
    """Expected share of the held-out problems."""
    split_seed: int = 0
    """Another seed, another split."""
    task: SpecRlTaskConfig = SpecRlTaskConfig()

    @model_validator(mode="after")
    def _check_problems(self) -> Self:
        # Here and not while loading: of a setting verifiers tells its user in one line, of an exception in a traceback.
        choose_problems(self)
        return self


class SpecRlTaskset(vf.Taskset[SpecRlTask, SpecRlConfig]):
    """The problems of one side of the split, in the file's order."""

    def load(self) -> list[SpecRlTask]:
        """One task per problem."""
        return [SpecRlTask(describe(problem), self.config.task) for problem in choose_problems(self.config)]


def choose_problems(config: SpecRlConfig) -> list[Problem]:
    """Choose the problems that the configuration names.

    Raises:
        ProblemsError: a file that cannot be read.
        ValueError: a side of the split without a problem.
    """
    problems = load_problems(config.problems)
    if config.split == "all":
        return problems
    train, held_out = split_problems(problems, config.held_out_share, config.split_seed)
    return train if config.split == "train" else held_out


def describe(problem: Problem) -> SpecRlData:
    """Describe a problem as a task's data.

    The question is that of evals/code_tasks.py, so that rewards can be compared.
    """
    return SpecRlData(
        id=problem.task_id,
        prompt=make_prompt(problem, "chat"),
        stub=problem.prompt,
        entry_point=problem.entry_point,
        test=problem.test,
        canonical_solution=problem.canonical_solution,
        open_ended=problem.open_ended,
        kind=problem.kind,
    )


def _grade_chat(problem: Problem, answer: str, limits: Limits) -> Verdict:
    """Blocks for seconds: the program is taken out of the answer by one process, and run by others."""
    return grade_answer(problem, answer, "chat", limits)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """One for all tasks of the process: what bounds the number of sandboxes."""
    return ThreadPoolExecutor(workers, thread_name_prefix="spec_rl-grading")
