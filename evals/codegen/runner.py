"""Asks for every sample of every problem, extracts the program and grades it, while others are being asked for.

Answers and grades are kept as they come (answers.jsonl, grades.jsonl): what is there is not asked or graded again, a
request that failed is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from laguna_serve.evals.codegen.grading import Limits, grade_answer
from laguna_serve.evals.codegen.samples import AnswerLine, GradeLine, Key
from laguna_serve.evals.extraction.extract import STOPS
from laguna_serve.evals.problems.problem import Form, Problem
from laguna_serve.evals.problems.protocols import make_prompt
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.openai_endpoint import Endpoint
from laguna_serve.serving.client.sampling import RequestFields
from laguna_serve.serving.kit.journal import KeyedJournal
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.machine.cores import count_cores

ANSWERS, GRADES = "answers.jsonl", "grades.jsonl"


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the model.

    `temperature` 0 is greedy; `template`: fields for the chat template, as {"enable_thinking": true}; `protocol`:
    problems/protocols.py's, whose prompts the problems have.
    """

    form: Form = "chat"
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    concurrency: int = 8
    protocol: str = "project"
    template: JsonObject = field(default_factory=dict)

    def make_sampling(self, problem: Problem, sample: int) -> RequestFields:
        """Make the request's fields for one sample; each has a seed of its own."""
        fields: RequestFields = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.temperature > 0:
            fields["seed"] = self.seed + sample
        if self.form == "completion":
            # OpenAI's own API takes four; the answer is cut at all of them in any case.
            fields["stop"] = list((problem.stops or STOPS)[:4])
        elif self.template:
            fields["chat_template_kwargs"] = self.template
        return fields


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: the answer, and its grade where there is an answer."""

    answer: AnswerLine
    graded: GradeLine | None

    @property
    def task_id(self) -> str:
        """The task id of the problem that was answered."""
        return self.answer.task_id


async def run_samples(
    endpoint: Endpoint,
    problems: Sequence[Problem],
    workload: Workload,
    limits: Limits,
    folder: Path,
    report: Callable[[int, int], None],
) -> list[Sample]:
    """All samples, in the problems' order. `report` gets (done, total) after each that was not there before.

    Raises:
        JailError: the sandbox could not be set up.
        JournalError, OSError: the folder's files cannot be read or written.
    """
    keys = [(problem, (problem.task_id, number)) for problem in problems for number in range(workload.samples)]
    answers = KeyedJournal(folder / ANSWERS, AnswerLine, lambda line: line.key)
    grades = KeyedJournal(folder / GRADES, GradeLine, lambda line: line.key)
    missing = [(problem, key) for problem, key in keys if key not in grades.by_key or key not in answers.by_key]
    finished: list[Key] = []
    with ThreadPoolExecutor(count_cores(), "grading") as pool:

        async def work(item: tuple[Problem, Key]) -> None:
            problem, key = item
            text = await _answer(endpoint, problem, key, workload, answers)
            if text is not None:
                loop = asyncio.get_running_loop()
                verdict = await loop.run_in_executor(pool, grade_answer, problem, text, workload.form, limits)
                grades.add(GradeLine.of(key, verdict))
            finished.append(key)
            report(len(finished), len(missing))

        await run_closed_loop(missing, workload.concurrency, work)
    return [Sample(answers.by_key[key], grades.by_key.get(key)) for _, key in keys]


async def _answer(
    endpoint: Endpoint, problem: Problem, key: Key, workload: Workload, answers: KeyedJournal[Key, AnswerLine]
) -> str | None:
    """Return the sample's answer, kept or asked for; None when the request failed, which is noted."""
    kept = answers.by_key.get(key)
    if kept is None or kept.text is None:
        prompt = make_prompt(problem, workload.form)
        try:
            answer = await endpoint.ask(prompt, workload.form, workload.make_sampling(problem, key[1]))
        except EndpointError as error:
            answers.add(AnswerLine(task_id=key[0], sample=key[1], error=str(error)))
            return None
        kept = AnswerLine.of(key, answer)
        answers.add(kept)
    return kept.text
