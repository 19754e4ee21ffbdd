"""A pass: every prompt through one arm at one load, greedy, with log-probabilities, kept as it goes.

A journal (serving/kit/journal.py) makes an interrupted pass continue where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
from msgspec import Struct

from laguna_serve.bench.arms.arms import Arm
from laguna_serve.bench.certificate.result import CertifiedArm
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import Client, list_checkpoints
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint


class _Line(Struct, frozen=True):
    """An answer on disk. `top`: of every step the tokens with their log-probabilities, as Probe has them."""

    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    top: tuple[tuple[tuple[int, float], ...], ...]


class StreamedAnswer(Struct, frozen=True, kw_only=True):
    """What is kept of a streamed answer."""

    prompt_id: str
    started_ns: int
    ended_ns: int
    token_ids: list[int]
    text: str


class PassedArm(Struct, frozen=True, kw_only=True):
    """An arm whose passes are all there, as `passes/NAME.json` keeps it.

    `streamed` was asked without log-probabilities.
    """

    about: CertifiedArm
    streamed: list[StreamedAnswer]


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


async def claim_endpoint(folder: Path, arm: Arm, session: aiohttp.ClientSession) -> str | None:
    """Find where an endpoint says that its model was loaded from, and note it beside its passes in `folder`.

    Raises:
        EndpointError: it does not say which models it serves.
        RunDirError: its passes were begun on another checkpoint.
    """
    served = await list_checkpoints(session, arm.base_url)
    root = served.get(arm.model_name or next(iter(served)))
    claim_folder(folder / f"{arm.name}-endpoint", {"checkpoint": [root, fingerprint(root) if root else ""]})
    return root


def refuse_cached(name: str, hits: int, answers: Path) -> None:
    """Refuse a pass, and remove its answers, where the prefix cache served `hits` tokens of its prompts.

    Raises:
        MeasurementStoppedError: it did; what it serves was not computed at the load that is certified.
    """
    if hits:
        answers.unlink(missing_ok=True)
        reason = f"the prefix cache served {hits} tokens of the {name}'s prompts"
        raise MeasurementStoppedError(f"{reason}; start its server with --no-enable-prefix-caching")


def _decode(line: _Line) -> Probe:
    return Probe(line.token_ids, tuple(dict(step) for step in line.top), line.text, line.prompt_ids)
