"""How many tokens should a drafter propose here? Every γ at every concurrency, measured against plain decoding.

The baseline engine stays up for the whole sweep, a candidate engine is started per γ; where both do not fit, one runs
at a time, the baseline first and last. What was measured is kept in DIR/points: the same command continues after an
interruption, and what fails, a γ or adaptive γ, does not lose the others. DIR gets sweep.json, sweep.md and sweep.png,
and the schedule goes where `laguna serve --gamma auto` finds it; the last stdout line is one JSON object (schema
laguna_serve.gamma_sweep/1). How γ is chosen and predicted: gamma/cost_model.py; what the drafter's share of a step is:
gamma/points.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import structs

from laguna_serve.bench.arms.arms import check_specs
from laguna_serve.bench.gamma.ablations import list_ablation_specs, measure_ablations
from laguna_serve.bench.gamma.adaptive import compare_adaptive, measure_adaptive
from laguna_serve.bench.gamma.conclusion import conclude
from laguna_serve.bench.gamma.mixed_load import compare_schedule, find_best_single
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.points import claim_points, measure_missing, read_points
from laguna_serve.bench.gamma.report import render_markdown, render_text
from laguna_serve.bench.gamma.result import LINE, SweepResult
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, print_result, run_command
from laguna_serve.serving.kit.environment import OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, hold_folder, is_begun

__all__ = ["SweepConfig", "SweepResult", "main", "sweep"]
EXAMPLES = """
examples:
  python bench/gamma_sweep.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --concurrency 1,4 --out out/sweep
  python bench/gamma_sweep.py --model MODEL --draft DRAFTER --gammas 3,5,7 --quick --prompts FILE --out DIR
  python bench/gamma_sweep.py --model tests/toy/teacher --draft tests/toy/dflash --concurrency 1,4 --mixed \\
      --stack fp8-kv prefix-caching chunked-prefill dense=tests/toy/dense \\
      --prompts tests/toy/prompts.jsonl --out out/sweep
  python bench/gamma_sweep.py --model tests/toy/teacher --draft tests/toy/dflash --concurrency 1,4,8,16 --adaptive \\
      --num-prompts 128 --temperature 1 --prompts tests/toy/prompts.jsonl --out out/sweep-t1
  python bench/gamma_sweep.py --model MODEL --draft DRAFTER --gammas 3,5,7,9,11 --beyond-block --sequential \\
      --prompts FILE --out DIR   # γ that the drafter was never trained for, one engine at a time
  python bench/gamma_sweep.py --model served-name --draft DRAFTER --baseline-url http://127.0.0.1:8000 \\
      --candidate-url 3=http://127.0.0.1:8003 --candidate-url 7=http://127.0.0.1:8007 --prompts FILE --out DIR

then: laguna serve MODEL --draft DRAFTER --gamma auto

exit status:
  0    held: every γ was measured and no divergence is a defect
  1    fell short: a γ failed, or a divergence is a defect
  2    could not run: bad input, or the baseline did not start
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        SweepConfig, argv, prog="bench/gamma_sweep.py", description=__doc__, epilog=EXAMPLES
    )

    def run() -> int:
        result: SweepResult | None = None
        try:
            for stage in sweep_in_stages(config):
                result = stage
        finally:  # the sweep itself is worth its table where an ablation could not be measured
            if result is not None:
                print_result(render_text(result), LINE(result), config.out, always_json=always_json)
        assert result is not None
        return HELD if result.held else FELL_SHORT

    return run_command("gamma_sweep.py", run, measures=True, interrupted=CONTINUES)


def sweep(config: SweepConfig) -> SweepResult:
    """Measure what is missing, choose γ, store the schedule, and write sweep.json, sweep.md and sweep.png.

    Raises:
        PromptsError, CheckpointError: something does not fit.
        EngineError, EndpointError, MeasurementStoppedError: something that all else is compared with could not be
            measured; what is finished stays in `config.out`.
    """
    *_, result = sweep_in_stages(config)
    return result


def sweep_in_stages(config: SweepConfig) -> Iterator[SweepResult]:
    """Yield the result as it grows, written at each stage.

    First the points, then ablations and mixed load where they are asked for. Raises as `sweep`.
    """
    check_out(config.out)
    with hold_folder(config.out):
        yield from _sweep(config)


def publish(config: SweepConfig, result: SweepResult) -> SweepResult:
    """Write sweep.json, sweep.md and sweep.png to the configuration's `out`."""
    write_result(config.out / "sweep.json", result)
    write_text(config.out / "sweep.md", render_markdown(result))
    from laguna_serve.bench.gamma.plot import draw  # takes a second to import

    draw(result, config.out / "sweep.png")
    return result


def _sweep(config: SweepConfig) -> Iterator[SweepResult]:
    progress, environment = Progress(), read_environment(current_argv())
    gammas, prompts = config.list_gammas(), config.load_prompts()
    split_prompts(prompts, config.num_prompts, 0)  # refuses too few
    if not is_begun(config.points):
        specs = [*map(config.make_spec, (None, *gammas)), *([config.make_adaptive_spec()] if config.adaptive else [])]
        check_specs([*specs, *list_ablation_specs(config, max(gammas))], config.max_tokens)
    claim_points(config, prompts[: config.num_prompts], environment)
    load = OtherLoad()
    failed = measure_missing(config, gammas, prompts, progress)
    environment = load.note(environment)
    kept = read_points(config.points)
    points = [point for point in kept if point.gamma in gammas and point.concurrency in config.concurrency]
    if not points:
        reasons = "; ".join(f"γ {gamma}: {reason}" for gamma, reason in failed.items())
        raise MeasurementStoppedError(f"no γ could be measured: {reasons}; {CONTINUES}")
    trained = [point for point in points if not point.beyond_block]
    result = conclude(config, prompts, environment, points, failed)
    yield publish(config, result)
    if config.adaptive:
        measured, reason = measure_adaptive(config, prompts, progress)
        adaptive = compare_adaptive(measured, trained, result.schedule, config.seed)
        lost = {} if reason is None else {"adaptive": reason}
        result = structs.replace(result, adaptive=adaptive, failed=result.failed | lost)
        yield publish(config, result)
    if config.stack:
        chosen = {choice.concurrency: choice.gamma for choice in result.choices}
        most = max(point.gamma for point in trained or points)
        gamma = chosen.get(config.concurrency[0]) or most  # γ* is plain decoding, or not known: show the most
        result = structs.replace(result, stack=measure_ablations(config, gamma, prompts, progress))
        yield publish(config, result)
    if config.mixed:
        schedule = result.schedule.num_speculative_tokens_per_batch_size
        mixed = compare_schedule(config, find_best_single(trained) if trained else 0, schedule, prompts, progress)
        yield publish(config, structs.replace(result, mixed=mixed))


if __name__ == "__main__":
    raise SystemExit(main())
