"""A pass: every prompt through one arm at one load, greedy, with log-probabilities, kept as it goes.

A journal (serving/kit/journal.py) makes an interrupted pass continue where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.journal import Journal


class _Line(msgspec.Struct, frozen=True):
    """An answer on disk. `top`: of every step the tokens with their log-probabilities, as Probe has them."""

    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    top: tuple[tuple[tuple[int, float], ...], ...]


class Answers:
    """The answers of one pass, by prompt id, in a file."""

    def __init__(self, path: Path) -> None:
        """Read those that are there. Raises JournalError."""
        self._journal = Journal(path, _Line)
        self.by_id: dict[str, Probe] = {line.id: _decode(line) for line in self._journal.entries}

    def add(self, prompt_id: str, answer: Probe) -> None:
        """File an answer; it is with the system when this returns."""
        top = tuple(tuple(step.items()) for step in answer.top)
        self._journal.append(_Line(prompt_id, answer.prompt_ids, answer.token_ids, answer.text, top))
        self.by_id[prompt_id] = answer


async def run_pass(
    client: Client, prompts: Sequence[Prompt], concurrency: int, answers: Answers, report: Callable[[int], None]
) -> None:
    """Send the prompts that have no answer yet, in order, `concurrency` in flight, the next as soon as one ends.

    `report` is called after each with how many of those are through.

    Raises:
        EndpointError: a request failed; the others that are in flight are broken off.
    """
    waiting = [prompt for prompt in prompts if prompt.id not in answers.by_id]
    before = len(answers.by_id)

    async def work(prompt: Prompt) -> None:
        answers.add(prompt.id, await client.probe(prompt))
        report(len(answers.by_id) - before)

    await run_closed_loop(waiting, concurrency, work)


def _decode(line: _Line) -> Probe:
    return Probe(line.token_ids, tuple(dict(step) for step in line.top), line.text, line.prompt_ids)
