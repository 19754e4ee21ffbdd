"""Does prefix caching cost a DFlash drafter its acceptance? Measured cold, warm, in chunks, in groups and preempted.

Every scenario runs on engines started here, one at a time; acceptance lengths and their intervals come from vLLM's
counters, read after each request or group, and so does the share of prompt tokens that the cache had, with the drafter
and without one. What an engine did is kept in DIR/points: the same command continues. DIR
gets prefix_cache.json, prefix_cache.md and the engines' logs; the last stdout line is one JSON object (schema
laguna_serve.prefix_cache/1). What is sent and why: prefix/traffic.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.bench.arms.arms import check_specs
from laguna_serve.bench.harness.prompts import load_texts
from laguna_serve.bench.prefix.options import PrefixCacheConfig
from laguna_serve.bench.prefix.report import render_markdown, render_text
from laguna_serve.bench.prefix.result import PrefixCacheResult, shorten
from laguna_serve.bench.prefix.runner import Outcome, run_engines
from laguna_serve.bench.prefix.traffic import name_plain, plan_traffic
from laguna_serve.bench.prefix.verdict import compare, describe
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, hold_out, is_begun

__all__ = ["PrefixCacheConfig", "PrefixCacheResult", "main", "measure_acceptance"]
EXAMPLES = """
examples:
  python bench/prefix_cache.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/prefix
  python bench/prefix_cache.py --model tests/toy/teacher --draft tests/toy/dflash-speculators --quick \\
      --prompts tests/toy/prompts.jsonl --out out/prefix

exit status:
  0    held: acceptance falls nowhere
  1    fell short: it falls somewhere, or nobody can say from so little, or a scenario could not be provoked
  2    could not run: bad input, or an engine did not start
  130  interrupted: what was measured is reported and marked partial; the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/prefix_cache.py", PrefixCacheConfig, __doc__, EXAMPLES, measures=True, interrupted="nothing was measured"
    )
    return command.run(
        argv,
        measure_acceptance,
        show=render_text,
        line=shorten,
        judge=lambda result: INTERRUPTED if result.partial else HELD if result.held else FELL_SHORT,
    )


@hold_out
def measure_acceptance(config: PrefixCacheConfig) -> PrefixCacheResult:
    """Send the traffic, compare, and write prefix_cache.json and prefix_cache.md to `config.out`.

    Raises:
        PromptsError: the prompts file cannot be used, or has too few.
        EngineError, EndpointError: an engine did not start or died, or a request failed.
        RunDirError: the folder holds another measurement.
        KeyboardInterrupt: it ended before anything was measured. Later, the result says that it is partial.
    """
    progress = Progress()
    lengths = config.characters, 2 * config.characters
    prompts = load_texts(config.prompts)
    traffic = plan_traffic(prompts, config.num_prompts, lengths, config.small_blocks, config.block_size)
    if not is_begun(config.points):
        check_specs(map(config.make_spec, traffic.engines), config.max_tokens)
    environment = read_environment(current_argv())
    claim_points(config, prompts, environment)
    load, outcomes = OtherLoad(), dict[str, Outcome]()
    interrupted = False
    try:
        run_engines(config, traffic, progress, outcomes)
    except KeyboardInterrupt:
        if not outcomes:
            raise
        interrupted = True
        progress.say("interrupted: reporting what was measured")
    reached = [c for c in traffic.comparisons if c.scenario in outcomes and c.against in outcomes]
    result = PrefixCacheResult(
        environment=load.note(environment),
        model=config.model,
        draft=config.draft,
        max_tokens=config.max_tokens,
        partial=interrupted,
        comparisons=[compare(c, outcomes[c.scenario], outcomes[c.against], config.seed) for c in reached],
        scenarios=[describe(o, outcomes.get(name_plain(name))) for name, o in outcomes.items() if o.scenario.drafted],
    )
    write_result(config.out / "prefix_cache.json", result)
    write_text(config.out / "prefix_cache.md", render_markdown(result))
    return result


def claim_points(config: PrefixCacheConfig, prompts: Sequence[Prompt], environment: Environment) -> None:
    """Take the folder of finished engines. Raises RunDirError when it holds those of another measurement."""
    names = ("model", "draft", "gamma", "compiled", "num_prompts", "characters", "max_tokens", "block_size")
    settings = {name: getattr(config, name) for name in (*names, "small_blocks", "dtype", "seed")} | {
        "prompts": [prompt.text for prompt in prompts],
        "checkpoints": [fingerprint(config.model), fingerprint(config.draft)],
        "versions": environment.versions,
        "device": environment.device.name if environment.device is not None else None,
    }
    claim_folder(config.points, settings)


if __name__ == "__main__":
    raise SystemExit(main())
