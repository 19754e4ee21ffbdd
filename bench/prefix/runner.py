"""Sends the traffic of bench/prefix_cache.py to one engine after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from laguna_serve.bench.harness.arms import Arm, open_arm
from laguna_serve.bench.prefix.options import PrefixCacheConfig
from laguna_serve.bench.prefix.traffic import REFERENCE, EngineSetting, Scenario, Traffic, plan_second_turn
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.counters import Counters, scrape_counters, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.kit.progress import Progress


@dataclass(slots=True)
class Outcome:
    """What a scenario did: a record for every request, and the counters' delta."""

    scenario: Scenario
    records: list[Record]
    delta: Counters

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Of every request the tokens that came in steps after the first, and these steps. One chunk is one step."""
        return [(sum(r.chunk_tokens[1:]), len(r.chunk_tokens) - 1) for r in self.records]

    @property
    def chunk_length(self) -> float:
        """Tokens per step by the chunks."""
        tokens, steps = sum(t for t, _ in self.steps), sum(s for _, s in self.steps)
        return tokens / max(1, steps)


def run_engines(config: PrefixCacheConfig, traffic: Traffic, progress: Progress, outcomes: dict[str, Outcome]) -> None:
    """Start one engine after the other and send each its scenarios; outcomes are filed by scenario as they come.

    Raises:
        EngineError, EndpointError: an engine did not start or died, or a request failed.
    """
    for setting in traffic.engines:
        scenarios = [scenario for scenario in traffic.scenarios if scenario.engine == setting.name]
        with open_arm(config.make_spec(setting), config.out, progress.say) as arm:
            asyncio.run(_run_scenarios(config, arm, setting, scenarios, traffic, progress, outcomes))


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
            outcomes[scenario.name] = await _send(session, config, arm, scenario)
        if setting.name in (REFERENCE, "caching"):
            answers = {record.prompt_id: record.text for record in outcomes["prompts"].records}
            scenario = plan_second_turn(traffic.shorts, answers, setting.name)
            progress.say(f"{scenario.name}: {len(scenario.prompts)} requests")
            outcomes[scenario.name] = await _send(session, config, arm, scenario)


async def _send(session: aiohttp.ClientSession, config: PrefixCacheConfig, arm: Arm, scenario: Scenario) -> Outcome:
    before = await scrape_counters(session, arm.base_url)
    records: list[Record] = []
    sampling = {"temperature": 1.0} if scenario.sampled else None
    client = Client(session, arm.base_url, arm.model_name or "", config.max_tokens, sampling)
    for prompts in scenario.rounds:
        records += await client.run_round(prompts)
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        arm.check()
        raise EndpointError(f"{scenario.name}: a request failed: {failed}")
    tokens = sum(len(record.token_ids) for record in records)
    after = await settle_counters(session, arm.base_url, before, tokens)
    return Outcome(scenario, records, after.since(before))
