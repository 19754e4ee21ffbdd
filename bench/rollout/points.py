"""One point of what rollouts cost: rounds of groups through both arms, interleaved, and all that was counted meanwhile.

A round is `batch` sequences that are sent at once and waited for, as a trainer's step does: groups of completions of
one shared prompt, a request each. Its prompts are new in the round, and the prefix cache is emptied before every turn:
a group may share its prompt's keys and values, and nothing is carried over from earlier rounds.

Device-seconds are, on a CPU, the processor time of the engine's processes (core-seconds, waiting loops included; the
kernel counts in steps of 10 ms) and, on a GPU, wall time times one device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import aiohttp

from laguna_serve.bench.arms.arms import BASELINE, Arm
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.bench.harness.schedule import Plan, make_plan
from laguna_serve.bench.harness.validity import check_drafts
from laguna_serve.bench.rollout.result import Turn, Work
from laguna_serve.bench.rollout.weights import empty_cache
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.counters import scrape_counters, settle_counters, sum_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.client.sampling import RequestFields
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.machine.processes import read_cpu_s

WARMUP_ROUNDS = 2
# What trainers ask for: the log-probability of each token that was drawn, without alternatives.
LOGPROBS = 0


class Driver:
    """One arm with an open session."""

    def __init__(self, session: aiohttp.ClientSession, arm: Arm, work: Work) -> None:
        self.arm, self._session, self._work = arm, session, work
        # Those of an endpoint that runs somewhere are not known.
        self._pids = arm.engine.pids if arm.engine is not None else list
        sampling: RequestFields = {"temperature": work.temperature, "logprobs": LOGPROBS}
        self._client = Client(session, arm.base_url, arm.model_name or "", work.max_tokens, sampling)

    async def run(self, prompts: Sequence[Prompt], sequences: int) -> Turn:
        """Run a group of `sequences` completions of each prompt, all at once.

        Raises:
            EngineError, EndpointError: the engine died, or a request failed.
            MeasurementStoppedError: the counters do not show this traffic alone.
        """
        tokens = len(prompts) * sequences * self._work.max_tokens
        try:
            await empty_cache(self._session, self.arm)
            before = await scrape_counters(self._session, self.arm.base_url)
            cpu_s, started = read_cpu_s(self._pids()), time.perf_counter()
            await asyncio.gather(*(self._client.sample(prompt, sequences) for prompt in prompts))
            wall_s = time.perf_counter() - started
            cpu_s = read_cpu_s(self._pids()) - cpu_s
            after = await settle_counters(self._session, self.arm.base_url, before, tokens)
        except EndpointError:
            self.arm.check()
            raise
        delta = after.since(before)
        if delta.generation_tokens != tokens:
            raise MeasurementStoppedError(
                f"{self.arm.name}: expected {tokens} tokens counted, got {delta.generation_tokens}; does somebody else "
                "use this engine?"
            )
        return Turn(tokens, wall_s, {"gpu": wall_s, "cpu": cpu_s}.get(self._work.device, 0.0), delta)


def plan_point(work: Work, batch: int, prompts: Sequence[Prompt]) -> Plan:
    """Plan the rounds of a batch size, from the file's first prompts, with the order of the arms in each."""
    requests, _ = work.split(batch)
    timed, warmup = split_prompts(prompts, work.rounds * requests, WARMUP_ROUNDS * requests)
    return make_plan(timed, warmup, max_tokens=work.max_tokens, concurrency=requests, control=0, seed=work.seed)


async def measure_point(
    work: Work,
    batch: int,
    prompts: Sequence[Prompt],
    drivers: Mapping[str, Driver],
    progress: Progress,
    *,
    gamma: int | None = None,
) -> dict[str, list[Turn]]:
    """Warm the arms that are up, then interleave them, or run the one alone. Returns the turns of each.

    `gamma`: what the candidate drafts in a step; None for one that decides, and may have decided against it.

    Raises:
        EngineError, EndpointError: an engine died, or a request failed.
        MeasurementStoppedError: somebody else used an engine, or the drafter never drafted.
    """
    plan, (_, sequences) = plan_point(work, batch, prompts), work.split(batch)
    for driver in drivers.values():
        for group in plan.warmup:
            await driver.run(group, sequences)
    turns: dict[str, list[Turn]] = {name: [] for name in drivers}
    progress.begin()
    done, total = 0, len(drivers) * len(plan.rounds)
    for group, order in zip(plan.rounds, plan.orders, strict=True):
        for name in order if len(drivers) > 1 else drivers:
            turns[name].append(await drivers[name].run(group, sequences))
            done += 1
            progress.step(name, done, total, turns[name][-1].tokens / turns[name][-1].wall_s)
    for name, own in turns.items():
        if name == BASELINE or gamma is not None:
            counted, drafted = sum_counters([turn.delta for turn in own]), None if name == BASELINE else gamma
            check_drafts(name, counted, drafted, by_url=drivers[name].arm.engine is None)
    return turns
