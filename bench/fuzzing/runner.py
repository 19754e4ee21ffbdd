"""One run of the fuzzer: keeps an engine up, sends batches, and cuts down what goes wrong."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

from laguna_serve.bench.fuzzing.client import Answer, ask_control, check_batch, open_session
from laguna_serve.bench.fuzzing.minimise import minimise
from laguna_serve.bench.fuzzing.options import FuzzConfig
from laguna_serve.bench.fuzzing.requests import Parameters, Request, draw_batches, list_parameters, list_singles
from laguna_serve.bench.fuzzing.result import Finding, FuzzedEngine, FuzzResult
from laguna_serve.serving.engine import Engine, EngineError
from laguna_serve.serving.engine.log import find_cause, read_log
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, to_json, write_result
from laguna_serve.serving.kit.run_dir import make_out

SINGLES_TOGETHER, BATCHES_PER_ROUND, REPORT_EVERY = 8, 50, 50
# How often a finding is tried again while it is cut down: each death costs the start of an engine.
MOST_ATTEMPTS = 14
KIND_CHARS = 160
# Of what is wrong: another answer to the control request than before.
CONTROL = "control"


class Fuzz:
    """One run: the engine, what was sent, and what was found."""

    def __init__(self, config: FuzzConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._engine: Engine | None = None
        self._control: list[int] = []
        self._environment = read_environment(current_argv())
        make_out(config.out)
        earlier = read_result(self._path, FuzzResult) if config.resume and self._path.exists() else None
        if earlier is None:
            self._sent.write_text("", encoding="utf-8")
            self._batches = self._requests = self._starts = 0
            self._minutes = 0.0
            self._findings: list[Finding] = []
            self._statuses = Counter[str]()
        else:
            self._batches, self._requests, self._starts = earlier.batches, earlier.requests, earlier.starts
            self._minutes, self._findings = earlier.minutes, earlier.findings
            self._statuses = Counter(earlier.statuses)

    @property
    def _path(self) -> Path:
        return self._config.out / "fuzz.json"

    @property
    def _sent(self) -> Path:
        return self._config.out / "sent.jsonl"

    async def run(self) -> None:
        """Send until the time is over."""
        began, before = time.monotonic(), self._minutes
        engine = await self._start()
        async with open_session() as session, session.get(engine.base_url + "/openapi.json") as response:
            parameters = list_parameters(await response.json())
        for batch in self._list_batches(parameters, engine.model_name):
            await self._try(batch)
            self._batches += 1
            self._minutes = before + (time.monotonic() - began) / 60
            if self._batches % REPORT_EVERY == 0:
                self.report()
            if time.monotonic() - began > 60 * self._config.minutes:
                return

    def report(self) -> FuzzResult:
        """Write what is known so far."""
        result = FuzzResult(
            environment=self._environment,
            engine=FuzzedEngine(model=self._config.model, draft=self._config.draft, seed=self._config.seed),
            batches=self._batches,
            requests=self._requests,
            starts=self._starts,
            minutes=self._minutes,
            deaths=sum(finding.died for finding in self._findings),
            findings=self._findings,
            statuses=dict(sorted(self._statuses.items())),
        )
        write_result(self._path, result)
        self._progress.say(
            f"{self._batches} batches, {self._requests} requests, {len(self._findings)} findings,"
            f" {self._minutes:.1f} min"
        )
        return result

    def close(self) -> None:
        """Take the engine down."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def _list_batches(self, parameters: Parameters, model: str) -> Iterator[list[Request]]:
        """Parameters alone, in an order drawn by seed, and drawn batches between; from where an earlier run stopped."""
        singles = list_singles(parameters, model)
        random.Random(self._config.seed).shuffle(singles)
        alone = (singles[start : start + SINGLES_TOGETHER] for start in range(0, len(singles), SINGLES_TOGETHER))

        def draw() -> Iterator[list[Request]]:
            for seed_value in count(self._config.seed * 1_000_003):
                yield from draw_batches(parameters, model, seed_value=seed_value, count=BATCHES_PER_ROUND)

        drawn = draw()
        mixed = chain(chain.from_iterable(zip(alone, drawn, strict=False)), drawn)
        return islice(mixed, self._batches, None)

    async def _start(self) -> Engine:
        """Return the engine, started if it is not running."""
        if self._engine is not None:
            return self._engine
        engine = Engine(self._config.make_engine(), log_path=self._config.out / f"engine-{self._starts}.log")
        self._engine = await asyncio.to_thread(engine.__enter__)
        self._starts += 1
        async with open_session() as session:
            tokens = await ask_control(session, engine.base_url, engine.model_name)
        if tokens is None:
            raise EngineError(f"engine {engine.model_name}: expected an answer to the control request, got none")
        self._control = tokens
        return self._engine

    async def _send(self, batch: list[Request]) -> tuple[list[Answer], list[str], bool]:
        """Answers, what is wrong, and whether the engine died; it is not replaced here."""
        engine = await self._start()
        async with open_session() as session:
            answers, wrong = await check_batch(session, engine.base_url, engine.model_name, batch, self._control)
        died = bool(wrong) and wrong[0].startswith("death")
        if died or any(line.startswith(CONTROL) for line in wrong):
            self.close()  # nothing that it says from now on is the fault of what it is asked
        if died:
            wrong.insert(0, f"death: {find_cause(read_log(engine.log_path))}")
        return answers, wrong, died

    async def _try(self, batch: list[Request]) -> None:
        with self._sent.open("a", encoding="utf-8") as sent:
            sent.writelines(json.dumps(to_json(request.quote())) + "\n" for request in batch)
        answers, wrong, died = await self._send(batch)
        self._requests += len(batch)
        self._statuses.update(
            f"{request.route} {answer.status or 'none'}" for request, answer in zip(batch, answers, strict=True)
        )
        for kind, lines in group(wrong, whole=died).items():
            await self._note(batch, kind, lines, died=died)

    async def _note(self, batch: list[Request], kind: str, wrong: list[str], *, died: bool) -> None:
        """Note a fault, with the smallest part of a batch that has it where it was not seen before."""
        known = next((finding for finding in self._findings if finding.kind == kind), None)
        if known is not None:
            known.seen += 1
            return

        async def persists(smaller: list[Request]) -> bool:
            return any(normalise(line) == kind for line in (await self._send(smaller))[1])

        smallest = await minimise(batch, persists, most=MOST_ATTEMPTS)
        requests = [request.quote() for request in smallest]
        self._findings.append(Finding(kind=kind, wrong=wrong, died=died, seen=1, requests=requests))
        self._progress.say(f"found: {wrong[0][:300]}\n  with {str(requests)[:600]}")
        self.report()


def group(wrong: Sequence[str], *, whole: bool) -> dict[str, list[str]]:
    """Group what is wrong with a batch by kind; `whole`: all of it is the first one's, as what follows a death."""
    if whole:
        return {normalise(wrong[0]): list(wrong)}
    found: dict[str, list[str]] = {}
    for line in wrong:
        found.setdefault(normalise(line), []).append(line)
    return found


def normalise(wrong: str) -> str:
    """Strip what is wrong of its numbers, so that it is reported once."""
    return re.sub(r"\d+", "#", wrong)[:KIND_CHARS]
