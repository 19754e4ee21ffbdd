"""Ablations on top of speculation: each with γ*, against its own plain decoding and against the plain target."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.gamma.options import Ablation, SweepConfig
from laguna_serve.bench.gamma.passes import Asked, make_measure, open_passes
from laguna_serve.bench.gamma.points import choose_sweep_order, join_point, measure_point, plan_point
from laguna_serve.bench.gamma.result import AblationResult, MeasuredPoint, PlainTarget
from laguna_serve.bench.harness.in_turn import measure_in_turn
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

PLAIN = "plain"


def measure_ablations(
    config: SweepConfig, gamma: int, prompts: list[Prompt], progress: Progress
) -> list[AblationResult]:
    """Every ablation of `config.stack` at concurrency 1; one that fails says so and does not lose the others.

    Raises:
        EngineError, EndpointError: the plain target, with which all are compared, could not be asked.
    """
    plain = _measure_plain(config, gamma, prompts, progress)
    return [_measure_ablation(config, ablation, gamma, prompts, plain, progress) for ablation in config.stack]


def list_ablation_specs(config: SweepConfig, gamma: int) -> list[ArmSpec]:
    """List the engines of every ablation at a γ."""
    return [spec for ablation in config.stack for spec in _make_specs(config, ablation, gamma)]


def _make_specs(config: SweepConfig, ablation: Ablation, gamma: int) -> list[ArmSpec]:
    return [
        ArmSpec(arm, f"{ablation.name}; γ {tokens or 0}", config=ablation.apply(config.make_engine(tokens)))
        for arm, tokens in ((BASELINE, None), (CANDIDATE, gamma))
    ]


def _measure_plain(config: SweepConfig, gamma: int, prompts: list[Prompt], progress: Progress) -> PlainTarget:
    path = _find_path(config, PLAIN)
    if path.exists() and (stored := read_result(path, PlainTarget)).gamma == gamma:
        return stored
    spec = ArmSpec(PLAIN, f"{config.model}; no drafter", config=config.make_engine(None))
    with open_arm(spec, config.points, progress.say) as arm:
        asked = asyncio.run(_ask(arm, prompts[: config.num_prompts], config.max_tokens))
    plain = PlainTarget(gamma=gamma, token_ids=asked.token_ids, loss=asked.loss, tokens=asked.tokens)
    write_result(path, plain)
    return plain


def _measure_ablation(
    config: SweepConfig, ablation: Ablation, gamma: int, prompts: list[Prompt], plain: PlainTarget, progress: Progress
) -> AblationResult:
    path = _find_path(config, ablation.file_name)
    if path.exists():
        stored = read_result(path, AblationResult)
        if (stored.gamma, stored.checkpoint) == (gamma, ablation.checkpoint):
            return stored
    progress.say(f"ablation {ablation.name}, γ {gamma}")
    specs = _make_specs(config, ablation, gamma)

    def ask(arm: Arm) -> Asked:
        return asyncio.run(_ask(arm, prompts[: config.num_prompts], config.max_tokens))

    try:
        point, asked = _measure_pair(config, ablation, gamma, prompts, specs, ask, progress)
    except (EngineError, EndpointError, MeasurementStoppedError) as error:
        progress.say(f"ablation {ablation.name} failed and is left out: {error}")
        return AblationResult(ablation=ablation.name, checkpoint=ablation.checkpoint, gamma=gamma, failed=str(error))
    result = _compare(ablation, point, asked, plain)
    write_result(path, result)
    return result


def _measure_pair(
    config: SweepConfig,
    ablation: Ablation,
    gamma: int,
    prompts: list[Prompt],
    specs: list[ArmSpec],
    ask: Callable[[Arm], Asked],
    progress: Progress,
) -> tuple[MeasuredPoint, Asked]:
    """Both arms of an ablation, and its plain one's answers; after the timed prompts, which a cache would know else."""
    order = choose_sweep_order(config, specs, prompts, progress)
    if not order.sequential:
        with open_arm(order.apply(specs[0]), config.points, progress.say) as baseline:
            if order.allows(baseline, progress.say):
                with open_arm(order.apply(specs[1]), config.points, progress.say) as candidate:
                    point = measure_point(config, gamma, 1, prompts, (baseline, candidate), progress)
                    return point, ask(baseline)
    passes = open_passes(config.points / f"passes-{ablation.file_name}-gamma{gamma}")
    plan = plan_point(config, 1, prompts)
    measure = make_measure(passes, {"c1": plan}, progress, {"c1": [gamma + 1]}, ask)
    failed = measure_in_turn(specs, {"c1": [CANDIDATE]}, passes, measure, progress)
    if (bracket := passes.find_bracket(CANDIDATE, "c1")) is None:
        raise MeasurementStoppedError(failed[CANDIDATE])
    asked = bracket.after.asked
    assert asked is not None, "plain engines are asked in each pass"
    return join_point(config, gamma, plan, bracket, specs[1]), asked


def _compare(ablation: Ablation, point: MeasuredPoint, asked: Asked, plain: PlainTarget) -> AblationResult:
    return AblationResult(
        ablation=ablation.name,
        checkpoint=ablation.checkpoint,
        gamma=point.gamma,
        speedup=point.speedup,
        ci95=point.ci95,
        tau=point.tau,
        tok_per_s=point.tok_per_s,
        memory=point.memory,
        parity=point.parity,
        drift=point.drift,
        failed=None,
        differ_from_plain_target=sum(a != b for a, b in zip(asked.token_ids, plain.token_ids, strict=True)),
        loss=asked.loss,
        loss_change=asked.loss - plain.loss,
    )


async def _ask(arm: Arm, prompts: Sequence[Prompt], max_tokens: int) -> Asked:
    async with open_session() as session:
        client = await arm.connect(session, max_tokens)
        answers, losses = [], []
        for prompt in prompts:
            answers.append(list((await client.probe(prompt)).token_ids))
            losses += await client.score(prompt)
    return Asked(token_ids=answers, loss=sum(losses) / len(losses), tokens=len(losses))


def _find_path(config: SweepConfig, name: str) -> Path:
    return config.points / f"stack-{name}.json"
