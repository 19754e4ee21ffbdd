"""One arm while it is measured: rounds are sent to it, and what comes back is filed."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp

from laguna_serve.bench.arms.arms import Arm
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, counter_delta, wall_s
from laguna_serve.bench.harness.schedule import Plan, Round
from laguna_serve.serving.client.completions import NONE, Client
from laguna_serve.serving.client.counters import SETTLE_S, scrape_counters, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.client.sampling import PLAIN_SAMPLING, RequestFields

# An endpoint that fails this many rounds in a row is taken for dead.
MAX_FAILED_ROUNDS = 3


class Driver:
    """One arm with an open session: sends rounds and files what comes back into its ArmRun."""

    def __init__(self, session: aiohttp.ClientSession, arm: Arm, client: Client, run: ArmRun, concurrency: int) -> None:
        self._session, self._arm, self._client, self._run = session, arm, client, run
        self._concurrency = concurrency
        self._tokens, self._seconds, self._failed_rounds = 0, 0.0, 0

    @property
    def tok_per_s(self) -> float:
        """Rate of the timed rounds so far."""
        return self._tokens / self._seconds if self._seconds else 0.0

    async def warm_up(self, rounds: Sequence[Round]) -> None:
        """Send the warm-up rounds; a failure here means that there is nothing to measure."""
        for prompts in rounds:
            for record in await self._send(prompts):
                if record.error is not None:
                    self._arm.check()
                    raise EndpointError(f"{self._arm.name}: the warm-up failed: {record.error}")

    async def _send(self, prompts: Round, fields: RequestFields = NONE) -> list[Record]:
        return await self._client.run_round(prompts, fields, self._concurrency)

    async def open_frame(self) -> None:
        """Read the counters before the timed rounds."""
        self._run.before = await scrape_counters(self._session, self._arm.base_url)

    async def close_frame(self, cut: bool = False) -> None:
        """Read the memory, and the counters after the timed rounds. `cut`: the rounds were broken off."""
        self._run.cut = cut
        self._run.memory, self._run.figures = self._arm.read_memory(), self._arm.read_figures()
        if self._run.before is not None:
            tokens = sum(len(record.token_ids) for record in self._run.records.values())
            url, settle_s = self._arm.base_url, 0.0 if cut else SETTLE_S
            self._run.after = await settle_counters(self._session, url, self._run.before, tokens, settle_s)

    async def run_round(self, index: int, prompts: Round) -> None:
        """Run and file one timed round."""
        records = await self._send(prompts)
        self._run.rounds[index] = records
        self._tokens += sum(len(record.token_ids) for record in records)
        self._seconds += wall_s(records)
        errors = [record.error for record in records if record.error is not None]
        self._failed_rounds = self._failed_rounds + 1 if errors else 0
        if errors:
            await self._arm.look_for_death()
        if self._failed_rounds >= MAX_FAILED_ROUNDS:
            name = self._arm.name
            raise MeasurementStoppedError(f"{name}: {MAX_FAILED_ROUNDS} rounds in a row failed, the last: {errors[-1]}")

    async def run_control(self, rounds: Sequence[Round]) -> None:
        """Run rounds again that were timed before, as far as none fails.

        Raises:
            EngineError: the engine died.
        """
        for prompts in rounds:
            records = await self._send(prompts)
            self._run.control += records
            if any(record.error is not None for record in records):
                await self._arm.look_for_death()
                return

    async def run_forced(self, rounds: Sequence[Round]) -> None:
        """Count over the same rounds with end-of-sequence ignored.

        Not filed where nothing drafts, no answer had ended by itself, or one fails.
        """
        counted, answers = counter_delta(self._run), self._run.records.values()
        if counted is None or counted.drafts == 0 or all(answer.finish_reason != "stop" for answer in answers):
            return
        before = await scrape_counters(self._session, self._arm.base_url)
        tokens = 0
        for prompts in rounds:
            records = await self._send(prompts, {"ignore_eos": True})
            if any(record.error is not None for record in records):
                self._arm.check()
                return
            tokens += sum(len(record.token_ids) for record in records)
        after = await settle_counters(self._session, self._arm.base_url, before, tokens)
        self._run.forced = after.since(before)

    async def probe(self, prompts: Sequence[Prompt]) -> None:
        """Run prompts again with log-probabilities; one that fails is left out, and its mismatch stays unexamined."""
        for prompt in prompts:
            try:
                self._run.probes[prompt.id] = await self._client.probe(prompt)
            except EndpointError:
                self._arm.check()


async def connect(session: aiohttp.ClientSession, arm: Arm, plan: Plan, run: ArmRun) -> Driver:
    """Make the driver of an arm, under the model name that is served there."""
    run.command = arm.command
    run.sampled = plan.temperature > 0
    ending: RequestFields = {"ignore_eos": not plan.stop_at_eos}
    if run.sampled:
        ending |= {**PLAIN_SAMPLING, "temperature": plan.temperature}
    return Driver(session, arm, await arm.connect(session, plan.max_tokens, ending), run, plan.concurrency)
