"""What does a rollout for RL cost, and does speculation make it cheaper? Groups of sampled completions.

Groups of completions of one shared prompt (`n` in one request, token ids and log-probabilities returned) go to the
plain engine and to the speculating one at every batch size, in turns where both fit and one after the other elsewhere:
tokens per second and per device-second, their ratio with an interval, acceptance, and the acceptance at which
speculation stops paying. `--versions` are checkpoints of later policies: both running engines are given each, the
drafter stays the old one. What was measured is kept in DIR/points: the same command continues. DIR gets rollouts.json,
rollouts.md and rollouts.png; the last stdout line is one JSON object (schema laguna_serve.rollouts/1). How a round is
run: rollout/points.py; break-even: rollout/break_even.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from laguna_serve.bench.rollout.break_even import PRICE, summarise_point
from laguna_serve.bench.rollout.options import RolloutsConfig
from laguna_serve.bench.rollout.report import render_markdown, render_text
from laguna_serve.bench.rollout.result import RolloutPoint, RolloutsResult, RolloutsWorkload
from laguna_serve.bench.rollout.runner import Job, measure_missing, prepare, read_point
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out

__all__ = ["RolloutsConfig", "RolloutsResult", "main", "measure_rollouts"]
EXAMPLES = """
examples:
  python bench/rollouts.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/rollouts
  python bench/rollouts.py --model M --draft D --gamma 7 --prompts FILE --out DIR \\
      --versions run/step-100 run/step-200 run/step-400 --version-batch 32
  python bench/rollouts.py --model served-name --draft D --baseline-url http://127.0.0.1:8000 \\
      --candidate-url 7=http://127.0.0.1:8001 --prompts FILE --out DIR   # started with VLLM_SERVER_DEV_MODE=1
  python bench/rollouts.py --model M --draft D --batch 8,64 --price-per-hour 3.50 --prompts FILE --out DIR

exit status:
  0    speculation pays at every batch and for every version: the ratio's interval lies above 1
  1    somewhere it does not pay, or the interval includes 1
  2    could not run: bad input, an engine did not start, died, or refused a version
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("bench/rollouts.py", RolloutsConfig, __doc__, EXAMPLES, measures=True, interrupted=CONTINUES)
    return command.run(
        argv, measure_rollouts, show=render_text, judge=lambda result: HELD if result.pays else FELL_SHORT
    )


@hold_out
def measure_rollouts(config: RolloutsConfig) -> RolloutsResult:
    """Measure what is missing, and write rollouts.json, rollouts.md and rollouts.png to `config.out`.

    Raises:
        PromptsError, CheckpointError, RunDirError: something does not fit.
        EngineError, EndpointError, MeasurementStoppedError: something could not be measured; finished points stay.
    """
    environment = read_environment(current_argv())
    job = prepare(config, environment)
    load = OtherLoad()
    measure_missing(job, Progress())
    result = conclude(config, job, load.note(environment))
    write_result(config.out / "rollouts.json", result)
    write_text(config.out / "rollouts.md", render_markdown(result))
    from laguna_serve.bench.rollout.plot import draw  # takes a second to import

    draw(result, config.out / "rollouts.png")
    return result


def conclude(config: RolloutsConfig, job: Job, environment: Environment) -> RolloutsResult:
    """Make the whole result, from the folder of finished points. The first version, None, is the model itself."""

    def summarise(batch: int, version: str | None) -> RolloutPoint:
        measured = read_point(job, batch, version)
        assert measured is not None, "measured before"
        return summarise_point(measured, config.seed, config.price_per_hour, adaptive=config.adaptive)

    points = [summarise(batch, None) for batch in job.batches]
    versions = [summarise(job.version_batch, name) for name in ([None, *job.versions] if job.versions else [])]
    return RolloutsResult(
        environment=environment,
        model=config.model,
        draft=config.draft,
        draft_sampling=config.draft_sampling,
        gamma=job.gamma,
        adaptive=config.adaptive,
        device=job.work.device,
        workload=RolloutsWorkload(
            **structs.asdict(job.work),
            prompts=str(config.prompts),
            prefix_caching=config.prefix_caching,
            sequential=any(point.drift for point in (*points, *versions)),
        ),
        points=points,
        versions=versions,
        price=PRICE,
        price_per_hour=config.price_per_hour,
    )


if __name__ == "__main__":
    raise SystemExit(main())
