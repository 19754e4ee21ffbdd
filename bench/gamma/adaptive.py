"""The arm whose γ is decided in every step, at each concurrency: against plain decoding, and the best fixed γ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from laguna_serve.bench.arms.arms import CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.gamma.cost_model import Point
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.passes import make_measure, open_passes
from laguna_serve.bench.gamma.points import choose_sweep_order, join_point, measure_point, plan_point
from laguna_serve.bench.gamma.result import AdaptivePoint, MeasuredPoint, PointFigures, Schedule
from laguna_serve.bench.harness.in_turn import measure_in_turn
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.bench.stats.drift import widen_quotient
from laguna_serve.bench.stats.intervals import bootstrap_ratio, pool_speedup
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result


def measure_adaptive(
    config: SweepConfig, prompts: list[Prompt], progress: Progress
) -> tuple[list[MeasuredPoint], str | None]:
    """Measure the adaptive engine at every concurrency; what is in the folder is read.

    Returns the points, and why some are missing, if so.

    Raises:
        EngineError, EndpointError, MeasurementStoppedError: plain decoding could not be measured.
    """
    paths = {concurrency: config.points / f"adaptive-c{concurrency}.json" for concurrency in config.concurrency}
    missing = [concurrency for concurrency, path in paths.items() if not path.exists()]
    reason = None
    if missing:
        progress.say(f"adaptive γ, concurrency {', '.join(map(str, missing))}")
        specs = [config.make_spec(None), config.make_adaptive_spec()]
        order = choose_sweep_order(config, specs, prompts, progress)
        done = False
        if not order.sequential:
            with open_arm(order.apply(specs[0]), config.points, progress.say) as baseline:
                if done := order.allows(baseline, progress.say):
                    spec = order.apply(specs[1])
                    reason = _measure_beside(config, baseline, spec, {c: paths[c] for c in missing}, prompts, progress)
        if not done:
            reason = _measure_in_turn(config, {c: paths[c] for c in missing}, prompts, progress)
    if reason is not None:
        progress.say(f"adaptive γ failed, and is left out where it is not measured: {reason}")
    return [read_result(path, MeasuredPoint) for path in paths.values() if path.exists()], reason


def _measure_beside(
    config: SweepConfig,
    baseline: Arm,
    spec: ArmSpec,
    missing: Mapping[int, Path],
    prompts: list[Prompt],
    progress: Progress,
) -> str | None:
    """Measure it beside the baseline, which is up. Returns why it ended early, if it did."""
    try:
        with open_arm(spec, config.points, progress.say) as candidate:
            for concurrency, path in missing.items():
                arms = (baseline, candidate)
                point = measure_point(config, config.most, concurrency, prompts, arms, progress, adaptive=True)
                write_result(path, point)
    except (EngineError, EndpointError, MeasurementStoppedError) as error:
        baseline.check()
        return str(error)
    return None


def _measure_in_turn(
    config: SweepConfig, missing: Mapping[int, Path], prompts: list[Prompt], progress: Progress
) -> str | None:
    """Measure one engine at a time. Returns why a point is missing, if one is."""
    parts = {concurrency: f"c{concurrency}" for concurrency in missing}
    plans = {part: plan_point(config, concurrency, prompts) for concurrency, part in parts.items()}
    passes = open_passes(config.points / "passes-adaptive")
    specs = [config.make_spec(None), config.make_adaptive_spec()]
    measure = make_measure(passes, plans, progress, drafts=False)
    reason = measure_in_turn(specs, {part: [CANDIDATE] for part in plans}, passes, measure, progress).get(CANDIDATE)
    for concurrency, part in parts.items():
        if (bracket := passes.find_bracket(CANDIDATE, part)) is None:
            continue
        try:
            point = join_point(config, config.most, plans[part], bracket, specs[1], adaptive=True)
        except MeasurementStoppedError as error:
            reason = str(error)
        else:
            write_result(missing[concurrency], point)
    return reason


def compare_adaptive(
    measured: Sequence[MeasuredPoint], fixed: Sequence[MeasuredPoint], schedule: Schedule, seed: int
) -> list[AdaptivePoint]:
    """Hold each adaptive point against the fixed γ that was fastest at its concurrency, and the schedule's there.

    Both were measured against plain decoding: the ratio is that of their speed-ups. Where no fixed γ is faster than
    plain decoding, that is the best, and the ratio to it the speed-up itself.
    """
    points = []
    for point in measured:
        others = [other for other in fixed if other.concurrency == point.concurrency and not other.beyond_block]
        best = max(others, key=lambda other: other.speedup, default=None)
        gamma = 0 if best is None or best.speedup <= 1 else best.gamma
        against, interval = point.speedup, point.ci95
        if best is not None and gamma:
            own, other = Point.of(point), Point.of(best)
            against = pool_speedup(own.pairs) / pool_speedup(other.pairs)
            interval = widen_quotient(bootstrap_ratio(own.pairs, other.pairs, seed), point.drift, best.drift)
        figures = {name: getattr(point, name) for name in PointFigures.__struct_fields__}
        points.append(
            AdaptivePoint(
                **figures,
                best=gamma,
                scheduled=_find_scheduled(schedule, point.concurrency),
                against_best=against,
                against_best_ci95=interval,
            )
        )
    return points


def _find_scheduled(schedule: Schedule, concurrency: int) -> int:
    ranges = schedule.num_speculative_tokens_per_batch_size
    return next((gamma for first, last, gamma in ranges if first <= concurrency <= last), ranges[-1][2])
