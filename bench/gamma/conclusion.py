"""From measured points to the result of a sweep: choices, schedule, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import UNSET

from laguna_serve.bench.gamma.cost_model import Point, choose_gamma, fit_costs, make_schedule
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.result import (
    Choice,
    MeasuredPoint,
    Schedule,
    StepCost,
    SweepResult,
    SweepWorkload,
    publish_point,
)
from laguna_serve.bench.harness.prompts import count_own_lengths
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.speculation.gamma_store import Advice, store_advice

UNTRAINED = "no γ within the drafter's block was measured"


def conclude(
    config: SweepConfig,
    prompts: Sequence[Prompt],
    environment: Environment,
    measured: Sequence[MeasuredPoint],
    failed: Mapping[int, str],
) -> SweepResult:
    """Choices, schedule and predictions; the schedule is stored for `laguna serve --gamma auto`.

    A γ beyond the drafter's block is not chosen, as `laguna serve` refuses it. Nothing is stored of endpoints, of
    answers drawn at a temperature, nor where no other γ was measured.
    """
    by_concurrency: dict[int, list[Point]] = {}
    trained: dict[int, list[Point]] = {}
    for point in measured:
        by_concurrency.setdefault(point.concurrency, []).append(Point.of(point))
        trained.setdefault(point.concurrency, []).extend([] if point.beyond_block else [Point.of(point)])
    choices = [
        choose_gamma(points, config.seed) if points else Choice(concurrency, 0, UNTRAINED)
        for concurrency, points in trained.items()
    ]
    models = {concurrency: fit_costs(points) for concurrency, points in by_concurrency.items()}
    schedule = make_schedule(choices)
    advice = Advice(config.model, config.draft, tuple(schedule), environment.date)
    known = not config.by_url and not config.temperature and all(trained.values())
    stored = store_advice(advice).name if known else None
    return SweepResult(
        environment=environment,
        model=config.model,
        draft=config.draft,
        workload=SweepWorkload(
            prompts=str(config.prompts),
            num_prompts=config.num_prompts,
            max_tokens=config.max_tokens,
            own_lengths=count_own_lengths(prompts[: config.num_prompts], config.max_tokens),
            waves=config.waves if config.waves > 1 else UNSET,
            num_warmups=UNSET if config.num_warmups is None else config.num_warmups,
            sequential=any(point.drift for point in measured),
            temperature=config.temperature,
            draft_sampling=config.draft_sampling,
        ),
        choices=choices,
        schedule=Schedule(schedule),
        stored=stored,
        cost={
            str(concurrency): StepCost(fixed=model.fixed, per_token=model.per_token)
            for concurrency, model in models.items()
        },
        failed={str(gamma): reason for gamma, reason in failed.items()},
        points=[publish_point(point, models[point.concurrency].speedup(point.gamma)) for point in measured],
    )
