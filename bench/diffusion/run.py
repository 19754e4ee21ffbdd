"""Measure which proposals pay when a masked diffusion model is decoded exactly.

Every proposer decodes the same prompts as the reference without proposals, in turns and in this process, with so many
requests in a pass, and must come to the same tokens. Then the references themselves are compared: other schedules and
caches are other texts, so that their distance is shown, never called lossless. DIR gets diffusion.json, diffusion.md
and, with a draft, draft_cost.png; the last stdout line is one JSON object (schema laguna_serve.diffusion_proposals/1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from laguna_serve.bench.diffusion import plot
from laguna_serve.bench.diffusion.report import count_differing, render_text, summarise
from laguna_serve.bench.diffusion.result import DiffusionResult, DraftPoint, ProposerPoint, ReferencePoint
from laguna_serve.bench.harness.prompts import load_texts
from laguna_serve.bench.stats.intervals import (
    RoundPair,
    bootstrap_pooled,
    bootstrap_speedup,
    keep_interval,
    pool_speedup,
)
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import OtherLoad, cite_environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, Quick, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out

if TYPE_CHECKING:
    from laguna_serve.bench.diffusion.arms import Arms, Timed
    from laguna_serve.plugins.diffusion.decoding.canvas import Canvas

__all__ = ["DiffusionConfig", "DiffusionResult", "main", "measure_proposals"]
EXAMPLES = """
examples:
  python bench/diffusion --model tests/toy/llada --draft tests/toy/llada-draft --prompts tests/toy/prompts.jsonl \\
      --proposals tests/toy/llada-proposals --out out/diffusion
  python scripts/training/diffusion/calibrate.py MODEL --prompts prompts.jsonl --first 64 --out out/proposals

exit status: 0 every token is the reference's, 1 some are not, 2 could not run, 130 interrupted (what is done is kept)
"""
SCHEDULES = ("1", "2", "0.9")
CACHES = ("none", "prefix", "dual")
FEWER_BITS = ("fp8", "int8", "int4")
# What a draft alone proposes: a pass per state, or one of it.
BY_DRAFT = ("draft, gated", "draft")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A model, what was learnt about its order, and prompts; files go to `out`."""

    model: Annotated[Path, Flag("LLaDA checkpoint: a folder")]
    draft: Annotated[Path | None, Flag("a smaller LLaDA with the same vocabulary")] = None
    draft_weights: Annotated[
        tuple[str, ...],
        Flag("measure the draft in fewer bits, too: fp8, int8, int4, with commas (default: none)", metavar="W,W,…"),
    ] = ()
    proposals: Annotated[Path, Flag("folder that calibrate.py wrote", metavar="DIR")]
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE", group="what to send")]
    num_prompts: Annotated[int, Flag("prompts (default: 64)", metavar="N", at_least=2)] = 64
    concurrency: Annotated[tuple[int, ...], Flag("requests in a pass (default: 1,4,16)", at_least=1)] = (1, 4, 16)
    canvas: Annotated[int, Flag("tokens of an answer's canvas (default: 64)", at_least=1)] = 64
    block: Annotated[int, Flag("tokens of a block (default: 32)", at_least=1)] = 32
    schedule: Annotated[str, Flag("tokens a step (1), or a threshold (0.9)")] = "1"
    cache: Annotated[str, Flag("none, prefix or dual (default: dual)")] = "dual"
    states: Annotated[int, Flag("proposed for each request and pass (default: 3)", metavar="N", at_least=1)] = 3
    device: Annotated[Literal["cpu", "cuda"], Flag("where the models compute (default: cpu)")] = "cpu"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag("of both models (default: the checkpoint's on a GPU, float32 on a CPU)"),
    ] = "auto"
    threads: Annotated[int, Flag("that compute (default: 1)", metavar="N", at_least=1, at_most=MOST_THREADS)] = 1
    seed: Annotated[int, Flag("of the intervals (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick("8 prompts, one and four at once", {"num_prompts": 8, "concurrency": (1, 4)})

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.draft_weights and self.draft is None:
            raise FlagError("--draft-weights: expected --draft beside it, got none; name the draft")
        if len(set(self.draft_weights)) < len(self.draft_weights):
            raise FlagError(f"--draft-weights: expected each once, got {', '.join(self.draft_weights)}; drop one")
        if unknown := set(self.draft_weights) - set(FEWER_BITS):
            expected = f"expected some of {', '.join(FEWER_BITS)}"
            raise FlagError(f"--draft-weights: {expected}, got {', '.join(sorted(unknown))}")
        if self.num_prompts < 2 * max(self.concurrency):
            least = 2 * max(self.concurrency)
            raise FlagError(f"--num-prompts: expected at least {least}, two rounds, got {self.num_prompts}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from laguna_serve.plugins.diffusion.errors import DiffusionError

    command = Command(
        "bench/diffusion",
        DiffusionConfig,
        __doc__,
        EXAMPLES,
        others=(DiffusionError,),
        measures=True,
        interrupted="nothing was measured",
    )
    return command.run(
        argv,
        measure_proposals,
        show=render_text,
        line=Brief(counted=("points.*.rounds", "points.*.counts")),
        judge=lambda result: INTERRUPTED if result.partial else FELL_SHORT if count_differing(result) else HELD,
    )


@hold_out
def measure_proposals(config: DiffusionConfig) -> DiffusionResult:
    """Measure every proposer at every concurrency, and write diffusion.json and diffusion.md to `config.out`.

    Raises:
        PromptsError: the prompts file cannot be used.
        DiffusionError: a checkpoint or what was learnt cannot be used.
        KeyboardInterrupt: it ended before anything was measured. Later, the result says that it is partial.
    """
    from laguna_serve.bench.diffusion.arms import TARGET, Arms, find_learnt

    given = [prompt.text for prompt in load_texts(config.prompts)]
    texts = choose_prompts(given, config.num_prompts, find_learnt(config.proposals, config.model, given))
    arms = Arms(
        config.model,
        config.draft,
        config.proposals,
        config.schedule,
        config.cache,
        config.device,
        config.threads,
        config.dtype,
    )
    for weights in [*config.draft_weights, TARGET]:  # whatever a device does not take is refused before anything runs
        arms.load_draft(weights)
    canvases = arms.make_canvases(texts, config.canvas, config.block)
    environment, progress, load = read_environment(current_argv()), Progress(), OtherLoad()
    arms.decode(canvases[:1], None, 0)
    points: list[ProposerPoint] = []
    references: list[ReferencePoint] = []
    drafts: list[DraftPoint] = []
    next_commits, cost, partial = None, arms.cost, False
    try:
        for concurrency in config.concurrency:
            progress.say(f"{concurrency} at once: {len(arms.proposers)} proposers and none, in turns")
            for point in _measure(arms, list(arms.proposers), canvases, concurrency, config, progress):
                points.append(point)
                progress.say(f"  {point.proposer}: {summarise(point)}")
        progress.say("the references, and how often the draft knows what is next")
        few = canvases[: max(2, len(canvases) // 4)]
        next_commits = arms.count_next_commits(few)
        references += _compare_references(arms, few)
        for weights in config.draft_weights:
            progress.say(f"the draft in {weights}, one at a time")
            drafts.append(_measure_draft(arms, weights, canvases, few, config, progress))
    except KeyboardInterrupt:
        if not points:
            raise
        partial = True
    result = DiffusionResult(
        environment=load.note(environment),
        model=str(config.model),
        draft=None if config.draft is None else str(config.draft),
        cost=cost,
        schedule=config.schedule,
        cache=config.cache,
        canvas=config.canvas,
        block=config.block,
        prompts=len(texts),
        states=config.states,
        next_commits=next_commits,
        points=points,
        references=references,
        drafts=drafts,
        dtype=arms.dtype,
        partial=partial,
    )
    write_result(config.out / "diffusion.json", result)
    if result.next_commits is not None:
        plot.draw(result, config.out / "draft_cost.png")
    write_text(config.out / "diffusion.md", f"```text\n{render_text(result)}\n```\n\n{cite_environment(environment)}\n")
    return result


def choose_prompts(texts: Sequence[str], number: int, learnt: Sequence[bool]) -> list[str]:
    """Choose the first prompts that nothing was learnt from.

    Raises:
        FlagError: there are not so many.
    """
    others = [text for text, known in zip(texts, learnt, strict=True) if not known]
    if len(others) < min(number, len(texts)):
        expected = f"expected at most {len(others)}, those that nothing was learnt from"
        raise FlagError(f"--num-prompts: {expected}, got {number}; give others, or calibrate on fewer")
    return others[:number]


def _measure_draft(
    arms: Arms,
    weights: str,
    canvases: Sequence[Canvas],
    few: Sequence[Canvas],
    config: DiffusionConfig,
    progress: Progress,
) -> DraftPoint:
    """Load the draft in fewer bits, and measure what it proposes alone."""
    arms.load_draft(weights)
    next_commits = arms.count_next_commits(few)
    assert next_commits is not None
    assert arms.cost is not None
    points = _measure(arms, BY_DRAFT, canvases, 1, config, progress)
    for point in points:
        progress.say(f"  {point.proposer}: {summarise(point)}")
    return DraftPoint(weights=weights, cost=arms.cost, next_commits=next_commits, points=points)


def _measure(
    arms: Arms,
    proposers: Sequence[str],
    canvases: Sequence[Canvas],
    concurrency: int,
    config: DiffusionConfig,
    progress: Progress,
) -> list[ProposerPoint]:
    """Measure every proposer and the reference in turns, a round of prompts after the other, each first in turn."""
    names: list[str | None] = [None, *proposers]
    rounds = [canvases[at : at + concurrency] for at in range(0, len(canvases) - concurrency + 1, concurrency)]
    progress.begin()
    done: dict[str | None, list[Timed]] = {name: [] for name in names}
    for number, canvases_of in enumerate(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            done[name].append(arms.decode(canvases_of, name, config.states))
        progress.step("rounds", number + 1, len(rounds))
    return [_sum_up(name, concurrency, done[None], done[name], config.seed) for name in proposers]


def _sum_up(
    name: str, concurrency: int, without: Sequence[Timed], proposed: Sequence[Timed], seed: int
) -> ProposerPoint:
    pairs = [RoundPair(a.tokens, a.seconds, b.tokens, b.seconds) for a, b in zip(without, proposed, strict=True)]
    steps, passes = [timed.steps for timed in proposed], [timed.passes for timed in proposed]
    states = sum(timed.proposed for timed in proposed)
    return ProposerPoint(
        proposer=name,
        concurrency=concurrency,
        steps_per_pass=sum(steps) / sum(passes),
        steps_per_pass_ci95=keep_interval(bootstrap_pooled(steps, passes, seed), len(pairs)),
        accepted=sum(timed.accepted for timed in proposed) / states if states else 0.0,
        tokens_per_s=sum(timed.tokens for timed in proposed) / sum(timed.seconds for timed in proposed),
        speedup=pool_speedup(pairs),
        speedup_ci95=keep_interval(bootstrap_speedup(pairs, seed), len(pairs)),
        differing=sum(
            a != b
            for of_reference, timed in zip(without, proposed, strict=True)
            for a, b in zip(of_reference.states, timed.states, strict=True)
        ),
        rounds=pairs,
        counts=list(zip(steps, passes, strict=True)),
    )


def _compare_references(arms: Arms, canvases: Sequence[Canvas]) -> list[ReferencePoint]:
    """Decode the same canvases by every schedule and cache, one request at a time."""
    made = {
        (schedule, cache): [arms.decode_as([canvas], schedule, cache) for canvas in canvases]
        for schedule in SCHEDULES
        for cache in CACHES
    }
    plain = [timed.states[0] for timed in made[SCHEDULES[0], CACHES[0]]]
    points = []
    for (schedule, cache), answers in made.items():
        same = [
            a == b
            for timed, other in zip(answers, plain, strict=True)
            for a, b in zip(timed.states[0], other, strict=True)
        ]
        points.append(
            ReferencePoint(
                schedule=schedule,
                cache=cache,
                steps=sum(timed.steps for timed in answers),
                tokens_per_s=sum(timed.tokens for timed in answers) / sum(timed.seconds for timed in answers),
                agreement=sum(same) / len(same),
            )
        )
    return points
