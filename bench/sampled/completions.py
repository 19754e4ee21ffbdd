"""Draws the completions of every arm, and keeps them: an arm that is in the folder is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence

import msgspec

from laguna_serve.bench.arms.arms import BASELINE, Arm, open_arm
from laguna_serve.bench.harness.validity import check_drafts
from laguna_serve.bench.sampled.options import Gamma, SamplingConfig
from laguna_serve.bench.stats.two_sample import Completion
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.counters import scrape_counters, settle_counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.speculation.flags import ADAPTIVE

AGAIN = "baseline again"
# Arm → prompt → its completions.
Sets = Mapping[str, list[list[Completion]]]


def name_gamma(gamma: Gamma) -> str:
    """Name the arm of a γ."""
    return f"γ {gamma}"


def draw_completions(
    config: SamplingConfig, gammas: Sequence[Gamma], prompts: Sequence[Prompt], progress: Progress
) -> Sets:
    """Every arm's completions by prompt; those that are in the folder are read.

    Raises:
        EngineError, EndpointError: an engine did not start or died, or a request failed; finished arms stay.
        MeasurementStoppedError: one did not draft as it was meant to.
    """
    sets: dict[str, list[list[Completion]]] = {}
    for index, gamma in enumerate([None, *gammas]):
        names = [BASELINE, AGAIN] if gamma is None else [name_gamma(gamma)]
        paths = {name: config.samples / f"{name.replace(' ', '-')}.json" for name in names}
        if not all(path.exists() for path in paths.values()):
            # Another seed for every engine, or their random numbers would be the same.
            with open_arm(config.make_spec(gamma, config.seed + index), config.samples, progress.say) as arm:
                for name, path in paths.items():
                    drawn = asyncio.run(_draw_arm(config, arm, name, gamma, prompts, progress))
                    write_text(path, json.dumps(drawn))
        for name, path in paths.items():
            sets[name] = msgspec.json.decode(path.read_bytes(), type=list[list[Completion]])
    return sets


async def _draw_arm(
    config: SamplingConfig, arm: Arm, name: str, gamma: Gamma | None, prompts: Sequence[Prompt], progress: Progress
) -> list[list[list[int]]]:
    progress.say(f"{name}: {len(prompts)} prompts × {config.completions} completions of {config.tokens} tokens")
    progress.begin()
    drawn = []
    async with open_session() as session:
        client = await arm.connect(session, config.tokens, {"temperature": config.temperature})
        before = await scrape_counters(session, arm.base_url)
        for done, prompt in enumerate(prompts, start=1):
            completions: list[list[int]] = []
            while len(completions) < config.completions:
                try:
                    completions += await client.sample(prompt, min(config.batch, config.completions - len(completions)))
                except EndpointError as error:
                    await arm.look_for_death()
                    raise EndpointError(f"{name}: {error}; {CONTINUES}") from error
            drawn.append(completions)
            progress.step(name, done, len(prompts))
        tokens = len(prompts) * config.completions * config.tokens
        counted = (await settle_counters(session, arm.base_url, before, tokens)).since(before)
    if gamma != ADAPTIVE:
        check_drafts(name, counted, gamma, by_url=config.by_url)
    return drawn
