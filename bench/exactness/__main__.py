"""Check that proposals change no token of a masked diffusion model's answers, and never cost a pass of the target.

Under every schedule, cache and temperature all prompts are decoded without proposals and with every proposer, many
requests in a pass, in this process. Nothing is timed. DIR gets exactness.json (schema
laguna_serve.diffusion_exactness/1) and exactness.md; each reference is kept as it is done, and the same command
continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from laguna_serve.bench.exactness.result import ExactnessResult, ExactPoint
from laguna_serve.bench.harness.prompts import load_texts
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, cite_environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_THREADS, BoundedConfig, Flag, FlagError, Quick
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, hold_out
from laguna_serve.serving.kit.tables import Table

if TYPE_CHECKING:
    from laguna_serve.bench.diffusion.arms import Arms
    from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
    from laguna_serve.plugins.diffusion.decoding.reference import Reference
    from laguna_serve.plugins.diffusion.proposing.interface import Run

EXAMPLES = """
examples:
  python bench/exactness --model tests/toy/llada --draft tests/toy/llada-draft --proposals tests/toy/llada-proposals \\
      --prompts tests/toy/prompts.jsonl --out out/exactness

exit status: 0 every token is the reference's and no answer took more passes, 1 some did not, 2 could not run,
130 interrupted: the same command continues
"""


@dataclass(frozen=True, kw_only=True)
class ExactnessConfig(BoundedConfig):
    """A model, what was learnt about its order, and prompts; files go to `out`."""

    model: Annotated[Path, Flag("LLaDA checkpoint: a folder")]
    draft: Annotated[Path | None, Flag("a smaller LLaDA with the same vocabulary")] = None
    proposals: Annotated[Path, Flag("folder that calibrate.py wrote", metavar="DIR")]
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE", group="what to decode")]
    num_prompts: Annotated[int, Flag("the first N prompts (default: 512)", metavar="N", at_least=1)] = 512
    schedules: Annotated[tuple[str, ...], Flag("tokens a step, or thresholds (default: 1,2,0.9)", metavar="S,…")] = (
        "1",
        "2",
        "0.9",
    )
    caches: Annotated[tuple[str, ...], Flag("default: none,dual", metavar="C,…")] = ("none", "dual")
    temperatures: Annotated[tuple[float, ...], Flag("default: 0", metavar="T,…", at_least=0)] = (0.0,)
    proposers: Annotated[
        tuple[str, ...] | None,
        Flag("by their names in the table (default: all that the folder and draft give)", metavar="P,…"),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        Flag("cut prompts to their last N tokens, which costs less without a cache", metavar="N", at_least=1),
    ] = None
    canvas: Annotated[int, Flag("tokens of an answer's canvas (default: 16)", at_least=1)] = 16
    block: Annotated[int, Flag("tokens of a block (default: 8)", at_least=1)] = 8
    states: Annotated[int, Flag("proposed for each request and pass (default: 3)", metavar="N", at_least=1)] = 3
    concurrency: Annotated[int, Flag("requests in a pass (default: 32)", metavar="N", at_least=1)] = 32
    threads: Annotated[int, Flag("that compute (default: 1)", metavar="N", at_least=1, at_most=MOST_THREADS)] = 1
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick("16 prompts, one token a step", {"num_prompts": 16, "schedules": ("1",)})


@dataclass(frozen=True, slots=True)
class Mode:
    """A reference by its settings."""

    schedule: str
    cache: str
    temperature: float

    @property
    def name(self) -> str:
        """What its part of the measurement is kept under."""
        return f"schedule-{self.schedule}-{self.cache}-t{self.temperature:g}"

    def read(self) -> Reference:
        """Make the reference. Raises DiffusionError where there is no such one."""
        from laguna_serve.plugins.diffusion.decoding.reference import read_reference

        return replace(read_reference(self.schedule, self.cache), temperature=self.temperature)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from laguna_serve.plugins.diffusion.errors import DiffusionError

    command = Command(
        "bench/exactness", ExactnessConfig, __doc__, EXAMPLES, others=(DiffusionError,), interrupted=CONTINUES
    )
    return command.run(
        argv, check_proposals, show=render_text, judge=lambda result: FELL_SHORT if result.wrong else HELD
    )


@hold_out
def check_proposals(config: ExactnessConfig) -> ExactnessResult:
    """Check every proposer under every reference, and write exactness.json and exactness.md to `config.out`.

    Raises:
        PromptsError: the prompts file cannot be used.
        DiffusionError: a checkpoint, what was learnt or a reference cannot be used.
        RunDirError: the folder holds the parts of another check.
    """
    texts = [prompt.text for prompt in load_texts(config.prompts)]
    if len(texts) < config.num_prompts:
        expected = f"expected at most {len(texts)}, got {config.num_prompts}"
        raise FlagError(f"--num-prompts: {expected}; the file has no more prompts")
    modes = [Mode(*mode) for mode in product(config.schedules, config.caches, config.temperatures)]
    for mode in modes:
        mode.read()
    environment, progress = read_environment(current_argv()), Progress()
    kept = config.out / "parts"
    claim_folder(kept, _list_settings(config, environment))
    points: list[ExactPoint] = []
    for number, mode in enumerate(modes):
        part = kept / f"{mode.name}.json"
        if not part.exists():
            progress.say(f"{mode.name}, {number + 1} of {len(modes)}")
            found = list(_check_mode(config, mode, texts[: config.num_prompts], progress))
            write_text(part, msgspec.json.encode(found).decode())
        points += msgspec.json.decode(part.read_bytes(), type=list[ExactPoint])
    result = ExactnessResult(
        environment=environment,
        model=str(config.model),
        draft=None if config.draft is None else str(config.draft),
        canvas=config.canvas,
        block=config.block,
        prompts=config.num_prompts,
        prompt_tokens=config.prompt_tokens,
        states=config.states,
        concurrency=config.concurrency,
        points=points,
    )
    write_result(config.out / "exactness.json", result)
    write_text(config.out / "exactness.md", f"```text\n{render_text(result)}\n```\n\n{cite_environment(environment)}\n")
    return result


def _list_settings(config: ExactnessConfig, environment: Environment) -> dict[str, object]:
    """List what decides what a part holds, and what is said of it."""
    checkpoints = [fingerprint(str(path)) for path in (config.model, config.draft, config.proposals) if path]
    prompts = [fingerprint(str(config.prompts)), config.num_prompts, config.prompt_tokens]
    canvas = [config.canvas, config.block, config.states]
    computed = [environment.versions, environment.git_commit, environment.cpu, environment.isa, config.threads]
    return {
        "checkpoints": checkpoints,
        "prompts": prompts,
        "canvas": canvas,
        "proposers": config.proposers,
        "concurrency": config.concurrency,
        "computed": computed,
    }


def _choose_proposers(config: ExactnessConfig, arms: Arms) -> Sequence[str]:
    """Choose those that are asked for; all where none are."""
    chosen = config.proposers or tuple(arms.proposers)
    if missing := [name for name in chosen if name not in arms.proposers]:
        raise FlagError(f"--proposers: expected some of {', '.join(arms.proposers)}, got {missing[0]!r}; choose others")
    return chosen


def _check_mode(config: ExactnessConfig, mode: Mode, texts: Sequence[str], progress: Progress) -> Iterator[ExactPoint]:
    """Decode all prompts as the reference and by every proposer."""
    from laguna_serve.bench.diffusion.arms import Arms

    arms = Arms(config.model, config.draft, config.proposals, mode.schedule, mode.cache, "cpu", config.threads)
    canvases = [
        replace(canvas, prompt=canvas.prompt[-(config.prompt_tokens or 0) :])
        for canvas in arms.make_canvases(texts, config.canvas, config.block)
    ]
    progress.begin()
    names = [None, *_choose_proposers(config, arms)]
    expected: list[Run] = []
    for number, name in enumerate(names):
        runs = _decode(arms, mode, canvases, name, config)
        progress.step(name or "reference", number + 1, len(names))
        if name is None:
            expected = runs
            continue
        yield ExactPoint(
            schedule=mode.schedule,
            cache=mode.cache,
            temperature=mode.temperature,
            proposer=name,
            prompts=len(runs),
            differing=sum(run.state != reference.state for run, reference in zip(runs, expected, strict=True)),
            slower=sum(run.passes > reference.steps for run, reference in zip(runs, expected, strict=True)),
            steps=sum(run.steps for run in runs),
            passes=sum(run.passes for run in runs),
        )


def _decode(
    arms: Arms, mode: Mode, canvases: Sequence[Canvas], proposer: str | None, config: ExactnessConfig
) -> list[Run]:
    """Decode all canvases, so many in a pass."""
    from laguna_serve.plugins.diffusion.predictor import Predictor
    from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation

    speculation = None if proposer is None else Speculation(arms.proposers[proposer], config.states)
    decoder = Decoder(Predictor(arms.target), mode.read(), (), speculation)
    together = range(0, len(canvases), config.concurrency)
    return [run for at in together for run in decoder.decode(canvases[at : at + config.concurrency])]


def render_text(result: ExactnessResult) -> str:
    """Render a row per reference and proposer."""
    heads = ("schedule", "cache", "T", "proposals", "steps per pass", "differ", "more passes")
    rows = [
        [
            point.schedule,
            point.cache,
            f"{point.temperature:g}",
            point.proposer,
            f"{point.steps / point.passes:.2f}",
            f"{point.differing} of {point.prompts}",
            f"{point.slower} of {point.prompts}",
        ]
        for point in result.points
    ]
    work = f"{result.prompts} prompts, canvas {result.canvas} in blocks of {result.block}, {result.states} states"
    return (
        f"{result.model}: {work}, {result.concurrency} requests in a pass\n\n{Table('lllllrr', heads, rows).to_text()}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
