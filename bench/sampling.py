"""Under temperature, does speculation preserve the distribution? A two-sample test on many short completions.

Every prompt is completed many times by the baseline, by the baseline again (the control) and by the candidate at every
γ, one engine after another: nothing is timed here, and one at a time needs the least memory. Each pair of sets is
tested prompt by prompt and as a whole (stats/two_sample.py), corrected for prompts and for the number of γ. The power
is simulated on what the baseline said: how large a share of completions would a bug have to turn into the likeliest one
to be found? DIR gets sampling.json and sampling.md, and keeps the completions, so that the same command continues; the
last stdout line is one JSON object (schema laguna_serve.sampling/1).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.bench.arms.arms import check_specs
from laguna_serve.bench.harness.prompts import PromptsError
from laguna_serve.bench.sampled.completions import draw_completions
from laguna_serve.bench.sampled.options import SamplingConfig
from laguna_serve.bench.sampled.report import render_markdown, render_text
from laguna_serve.bench.sampled.result import LINE, SamplingResult, SamplingWorkload
from laguna_serve.bench.sampled.verdict import check_level, judge
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, hold_out, is_begun

__all__ = ["SamplingConfig", "SamplingResult", "compare_distributions", "main"]
EXAMPLES = """
examples:
  python bench/sampling.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/sampling
  python bench/sampling.py --model served-name --draft D --baseline-url http://127.0.0.1:8000 \\
      --candidate-url 7=http://127.0.0.1:8001 --prompts FILE --out DIR   # two servers that already run
  python bench/sampling.py --model M --draft D --gammas 7 --temperature 0.7 --quick --prompts FILE --out DIR
  python bench/sampling.py --model tests/toy/teacher --draft tests/toy/dflash --adaptive --batch 2 \\
      --prompts tests/toy/prompts.jsonl --out DIR   # γ decided in every step

exit status:
  0    held: no γ differs detectably from the baseline
  1    fell short: some γ samples from another distribution, or the control fails
  2    could not run: bad input, or an engine did not start or died
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("bench/sampling.py", SamplingConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(
        argv,
        compare_distributions,
        show=render_text,
        line=LINE,
        judge=lambda result: HELD if result.held else FELL_SHORT,
    )


@hold_out
def compare_distributions(config: SamplingConfig) -> SamplingResult:
    """Draw what is missing, compare, and write sampling.json and sampling.md to `config.out`.

    Raises:
        PromptsError, CheckpointError, FlagError, RunDirError: something does not fit.
        EngineError, EndpointError, MeasurementStoppedError: an engine did not start or died, a request failed, or an
            arm did not draft as it was meant to; finished arms stay.
    """
    environment = read_environment(current_argv())
    prompts, gammas = choose_prompts(config), config.list_gammas()
    check_level(config, len(gammas))
    if not is_begun(config.samples):
        check_specs((config.make_spec(gamma, config.seed) for gamma in (None, *gammas)), config.tokens)
    claim_samples(config, prompts, environment)
    judgement = judge(draw_completions(config, gammas, prompts, Progress()), gammas, config.level, config.seed)
    result = SamplingResult(
        environment=environment,
        model=config.model,
        draft=config.draft,
        draft_sampling=config.draft_sampling,
        workload=SamplingWorkload(
            prompts=config.num_prompts,
            completions=config.completions,
            tokens=config.tokens,
            temperature=config.temperature,
        ),
        level=config.level,
        comparisons=judgement.comparisons,
        power={str(share): value for share, value in judgement.power.items()},
        detectable_share=judgement.detectable_share,
    )
    write_result(config.out / "sampling.json", result)
    write_text(config.out / "sampling.md", render_markdown(result))
    return result


def choose_prompts(config: SamplingConfig) -> list[Prompt]:
    """Choose the first prompts of the file. Raises PromptsError when there are too few."""
    prompts = config.load_prompts(lengths=False)
    if config.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {config.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    return prompts[: config.num_prompts]


def claim_samples(config: SamplingConfig, prompts: Sequence[Prompt], environment: Environment) -> None:
    """Take the folder of finished arms. Raises RunDirError when they were drawn otherwise."""
    names = ("model", "draft", "draft_sampling", "temperature", "completions", "tokens", "dtype", "eager", "seed")
    settings = {name: getattr(config, name) for name in names} | {
        "prompts": [prompt.text for prompt in prompts],
        "checkpoints": [fingerprint(config.model), fingerprint(config.draft)],
        "versions": environment.versions,
        **({"batch": config.batch} if config.batch != SamplingConfig.batch else {}),
        **config.list_urls(),
    }
    claim_folder(config.samples, settings)


if __name__ == "__main__":
    raise SystemExit(main())
