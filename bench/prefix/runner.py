"""Sends the traffic of bench/prefix_cache.py to one engine after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from msgspec import Struct

from laguna_serve.bench.arms.arms import Arm, open_arm
from laguna_serve.bench.harness.schedule import Round
from laguna_serve.bench.prefix.options import PrefixCacheConfig
from laguna_serve.bench.prefix.traffic import REFERENCE, EngineSetting, Scenario, Traffic, plan_second_turn
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.counters import Counters, scrape_counters, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

ATTEMPTS = 4


@dataclass(slots=True)
class Outcome:
    """What a scenario did: a record for every request, and the engine's counters after so many of them (0 first)."""

    scenario: Scenario
    records: list[Record]
    readings: dict[int, Counters]

    @property
    def delta(self) -> Counters:
        """What the engine counted over the whole scenario."""
        return self.readings[len(self.records)].since(self.readings[0])

    @property
    def chunk_length(self) -> float:
        """Tokens per chunk after a stream's first. A server that lags joins steps, so this is at least acceptance."""
        tokens = sum(sum(record.chunk_tokens[1:]) for record in self.records)
        return tokens / max(1, sum(len(record.chunk_tokens) - 1 for record in self.records))


class KeptOutcome(Struct, frozen=True, kw_only=True):
    """An outcome as DIR/points keeps it."""

    records: list[Record]
    readings: dict[int, Counters]


class EngineOutcomes(Struct, frozen=True, kw_only=True):
    """All that one engine did, by scenario."""

    outcomes: dict[str, KeptOutcome]


def run_engines(config: PrefixCacheConfig, traffic: Traffic, progress: Progress, outcomes: dict[str, Outcome]) -> None:
    """Start one engine after the other and send each its scenarios; outcomes are filed by scenario as they come.

    An engine that was through with all of them is read from DIR/points. One that was not starts again from the first,
    as what a cache holds is theirs.

    Raises:
        EngineError, EndpointError: an engine did not start or died, or a request failed.
    """
    for setting in traffic.engines:
        scenarios = [scenario for scenario in traffic.scenarios if scenario.engine == setting.name]
        spec = config.make_spec(setting)
        path = config.points / f"{spec.name}.json"
        if path.exists():
            progress.say(f"{setting.name}: continuing, it was measured")
            _read_outcomes(path, scenarios, traffic, setting, outcomes)
            continue
        with open_arm(spec, config.out, progress.say) as arm:
            asyncio.run(_run_scenarios(config, arm, setting, scenarios, traffic, progress, outcomes))
        own = {name: one for name, one in outcomes.items() if one.scenario.engine == setting.name}
        kept = {name: KeptOutcome(records=one.records, readings=one.readings) for name, one in own.items()}
        write_result(path, EngineOutcomes(outcomes=kept))


def _read_outcomes(
    path: Path, scenarios: Sequence[Scenario], traffic: Traffic, setting: EngineSetting, outcomes: dict[str, Outcome]
) -> None:
    kept = read_result(path, EngineOutcomes).outcomes
    for scenario in scenarios:
        outcomes[scenario.name] = Outcome(scenario, kept[scenario.name].records, kept[scenario.name].readings)
    if (second := _plan_second_turn(traffic, setting, outcomes)) is not None:
        outcomes[second.name] = Outcome(second, kept[second.name].records, kept[second.name].readings)


def _plan_second_turn(traffic: Traffic, setting: EngineSetting, outcomes: dict[str, Outcome]) -> Scenario | None:
    """With the answers of the engine without caching; None for engines that are not asked a second turn."""
    if setting.name not in (REFERENCE, "caching"):
        return None
    answers = {record.prompt_id: record.text for record in outcomes["prompts"].records}
    return plan_second_turn(traffic.shorts, answers, setting.name)


async def _run_scenarios(
    config: PrefixCacheConfig,
    arm: Arm,
    setting: EngineSetting,
    scenarios: Sequence[Scenario],
    traffic: Traffic,
    progress: Progress,
    outcomes: dict[str, Outcome],
) -> None:
    async with open_session() as session:
        for scenario in scenarios:
            progress.say(f"{scenario.name}: {len(scenario.prompts)} requests")
            for attempt in range(ATTEMPTS):
                outcome = outcomes[scenario.name] = await _send(session, config, arm, scenario)
                if not scenario.provokes or getattr(outcome.delta, scenario.provokes):
                    break
                progress.say(f"{scenario.name}: no {scenario.provokes} in attempt {attempt + 1} of {ATTEMPTS}")
        if (second := _plan_second_turn(traffic, setting, outcomes)) is not None:
            progress.say(f"{second.name}: {len(second.prompts)} requests")
            outcomes[second.name] = await _send(session, config, arm, second)


async def _send_round(client: Client, prompts: Round, scenario: Scenario, first: int) -> list[Record]:
    if not scenario.sampled:
        return await client.run_round(prompts)
    # Each its own seed, the same in every scenario: both draw alike, and what differs between them is no chance.
    seeded = enumerate(prompts, first)
    rounds = await asyncio.gather(*(client.run_round([p], {"temperature": 1.0, "seed": seed}) for seed, p in seeded))
    return [record for (record,) in rounds]


async def _send(session: aiohttp.ClientSession, config: PrefixCacheConfig, arm: Arm, scenario: Scenario) -> Outcome:
    reading = await scrape_counters(session, arm.base_url)
    readings = {0: reading}
    records: list[Record] = []
    client = Client(session, arm.base_url, arm.model_name or "", config.max_tokens)
    for prompts in scenario.rounds:
        answers = await _send_round(client, prompts, scenario, len(records))
        failed = next((record.error for record in answers if record.error is not None), None)
        if failed is not None:
            arm.check()
            raise EndpointError(f"{scenario.name}: a request failed: {failed}")
        records += answers
        tokens = sum(len(record.token_ids) for record in answers)
        reading = await settle_counters(session, arm.base_url, reading, tokens)
        readings[len(records)] = reading
    outcome = Outcome(scenario, records, readings)
    if scenario.drafted and outcome.delta.drafts <= 0:
        raise EndpointError(f"{scenario.name}: expected drafts, got none by the engine's counters")
    return outcome
