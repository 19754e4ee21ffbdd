"""A pass: every prompt through one arm at one load, greedy, with log-probabilities, kept as it goes.

A journal (JSON Lines, one answer per line) makes an interrupted pass continue where it stopped; a line that was cut off
in writing is dropped and its prompt sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from laguna_serve.serving.client.closed_loop import run_closed_loop
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Prompt


class Journal:
    """The answers of one pass, by prompt id."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Probe] = {}
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _is_whole(line)]
            path.write_text("".join(whole), encoding="utf-8")
            for line in whole:
                prompt_id, answer = _decode(json.loads(line))
                self.answers[prompt_id] = answer

    def add(self, file: TextIO, prompt_id: str, answer: Probe) -> None:
        """File an answer; it is on disk when this returns."""
        file.write(json.dumps(_encode(prompt_id, answer), ensure_ascii=True) + "\n")
        file.flush()
        self.answers[prompt_id] = answer


async def run_pass(
    client: Client, prompts: Sequence[Prompt], concurrency: int, journal: Journal, report: Callable[[int], None]
) -> None:
    """Send the prompts that the journal lacks, in order, `concurrency` in flight, the next as soon as one ends.

    `report` is told after each how many of those are through.

    Raises:
        EndpointError: a request failed; the others that are in flight are broken off.
    """
    waiting = [prompt for prompt in prompts if prompt.id not in journal.answers]
    before = len(journal.answers)
    with journal.path.open("a", encoding="utf-8") as file:

        async def work(prompt: Prompt) -> None:
            journal.add(file, prompt.id, await client.probe(prompt.text))
            report(len(journal.answers) - before)

        await run_closed_loop(waiting, concurrency, work)


def _is_whole(line: str) -> bool:
    if not line.endswith("\n"):
        return False
    with suppress(ValueError):
        json.loads(line)
        return True
    return False


def _encode(prompt_id: str, answer: Probe) -> dict[str, Any]:
    return {
        "id": prompt_id,
        "prompt_ids": answer.prompt_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "top": [list(step.items()) for step in answer.top],
    }


def _decode(item: dict[str, Any]) -> tuple[str, Probe]:
    top = tuple(dict(map(tuple, step)) for step in item["top"])
    return item["id"], Probe(tuple(item["token_ids"]), top, item["text"], tuple(item["prompt_ids"]))
