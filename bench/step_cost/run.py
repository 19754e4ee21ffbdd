"""What does a step with drafts cost, in steps without, and which part of it? One request at a time.

Two engines, one with the drafter and one without, each in a process of its own with the flags and environment of
`laguna serve`, decode every prompt in turn. Times are processor time of the engine's process, so that other work on
the machine disturbs them least; the HTTP server and the pipes to it are left out. A second pass times every part.
DIR gets step_cost.json and step_cost.md; the last stdout line is one JSON object (schema laguna_serve.step_cost/1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from laguna_serve.bench.arms.arms import check_answers
from laguna_serve.bench.arms.drafters import Temperature, TimedDrafterConfig, check_draft_sampling
from laguna_serve.bench.harness.prompts import load_texts, split_prompts
from laguna_serve.bench.stats.intervals import NO_INTERVAL, RoundPair, bootstrap_speedup, keep_interval, pool_speedup
from laguna_serve.bench.step_cost.engine import Decoded, StepEngine, open_engine
from laguna_serve.bench.step_cost.result import ArmSteps, StepCostResult
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import OtherLoad, cite_environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, Quick
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.planning.launch import check_launches
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING
from laguna_serve.serving.speculation.flags import DraftSampling, Gamma

__all__ = ["StepCostConfig", "StepCostResult", "main", "measure_steps"]
EXAMPLES = """
examples:
  python bench/step_cost --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/step-cost
  python bench/step_cost --model tests/toy/teacher --draft tests/toy/dflash --quick \\
      --prompts tests/toy/prompts.jsonl --out out/step-cost

exit status: 0 measured, 2 could not run, 130 interrupted: nothing was measured
"""
WARM_UP = 2
MS = 1e6


@dataclass(frozen=True, kw_only=True)
class StepCostConfig(TimedDrafterConfig):
    """A model and its drafter, and prompts to decode with and without it; files go to `out`."""

    gamma: Gamma = None
    draft_sampling: DraftSampling = "greedy"
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE", group="what to send")]
    num_prompts: Annotated[int, Flag("prompts (default: 24)", metavar="N", at_least=2)] = 24
    max_tokens: Annotated[int, Flag("output tokens per request (default: 128)", metavar="N", at_least=16)] = 128
    temperature: Temperature = 0.0
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick("4 prompts × 48 tokens, not compiled", {"num_prompts": 4, "max_tokens": 48, "eager": True})

    def __post_init__(self) -> None:
        """Refuse drawn drafts of greedy answers."""
        super().__post_init__()
        check_draft_sampling(self.draft_sampling, self.temperature)

    def make_engine(self, *, drafting: bool) -> EngineConfig:
        """Make an arm's engine."""
        return EngineConfig(
            model=self.model,
            draft=self.draft if drafting else None,
            gamma=self.gamma if drafting else None,
            draft_sampling=self.draft_sampling if drafting else DRAFT_SAMPLING[0],
            dtype=self.dtype,
            enforce_eager=self.eager,
            kv_cache_gib=self.kv_cache_gib,
            seed=self.seed,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/step_cost", StepCostConfig, __doc__, EXAMPLES, measures=True, interrupted="nothing was measured"
    )
    return command.run(argv, measure_steps, show=render_text, line=Brief(counted=("rounds", "token_rounds")))


@hold_out
def measure_steps(config: StepCostConfig) -> StepCostResult:
    """Decode every prompt on both engines, and write step_cost.json and step_cost.md to `config.out`.

    Raises:
        PromptsError: the prompts file cannot be used.
        EngineError: an engine did not start, or died.
    """
    prompts, _ = split_prompts(load_texts(config.prompts), config.num_prompts, 0)
    engines = [config.make_engine(drafting=drafting) for drafting in (False, True)]
    for engine in engines:
        check_answers(engine, config.max_tokens)
    check_launches(engines)
    gamma = inspect(engines[1]).gamma
    environment, progress, load = read_environment(current_argv()), Progress(), OtherLoad()
    progress.say("starting an engine without the drafter, and one with it")
    with (
        open_engine(engines[0], config.out / "plain.log") as plain,
        open_engine(engines[1], config.out / "drafted.log") as drafted,
    ):
        arms = (plain, drafted)
        _take_turns(config, arms, prompts[:WARM_UP], apart=False)
        progress.say(f"{len(prompts)} prompts, whole steps")
        whole = _take_turns(config, arms, prompts, apart=False)
        progress.say("the same, every part by itself")
        apart = _take_turns(config, arms, prompts, apart=True)
    rounds = [RoundPair(a.steps, a.ns / 1e9, b.steps, b.ns / 1e9) for a, b in whole]
    token_rounds = [RoundPair(a.tokens, a.ns / 1e9, b.tokens, b.ns / 1e9) for a, b in whole]
    low, high = bootstrap_speedup(rounds, config.seed)
    result = StepCostResult(
        environment=load.note(environment),
        model=config.model,
        draft=config.draft,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        draft_sampling=config.draft_sampling,
        prompts=len(prompts),
        plain=_sum_up("plain", None, [a for a, _ in whole], [a for a, _ in apart]),
        drafted=_sum_up(f"γ {gamma}", gamma, [b for _, b in whole], [b for _, b in apart]),
        cost=1 / pool_speedup(rounds),
        cost_ci95=keep_interval((1 / high, 1 / low), len(rounds)),
        speedup=pool_speedup(token_rounds),
        speedup_ci95=keep_interval(bootstrap_speedup(token_rounds, config.seed), len(rounds)),
        differing=None if config.temperature else sum(a.token_ids != b.token_ids for a, b in whole),
        rounds=rounds,
        token_rounds=token_rounds,
    )
    write_result(config.out / "step_cost.json", result)
    write_text(config.out / "step_cost.md", render_markdown(result))
    return result


def _take_turns(
    config: StepCostConfig, engines: tuple[StepEngine, StepEngine], prompts: Sequence[Prompt], *, apart: bool
) -> list[tuple[Decoded, Decoded]]:
    """Decode every prompt on one engine and then on the other, each of them first in turn."""
    pairs = []
    for number, prompt in enumerate(prompts):
        order = engines if number % 2 else engines[::-1]
        how = (config.max_tokens, config.temperature)
        answers = {engine: engine.decode(prompt.text, *how, apart=apart) for engine in order}
        pairs.append((answers[engines[0]], answers[engines[1]]))
    return pairs


def _sum_up(label: str, gamma: int | None, whole: Sequence[Decoded], apart: Sequence[Decoded]) -> ArmSteps:
    steps, tokens = sum(one.steps for one in whole), sum(one.tokens for one in whole)
    parts: Counter[str] = Counter()
    for one in apart:
        parts.update(one.parts)
    timed = sum(one.steps for one in apart)
    return ArmSteps(
        label=label,
        gamma=gamma,
        steps=steps,
        tokens=tokens,
        step_ms=sum(one.ns for one in whole) / steps / MS,
        tokens_per_step=tokens / steps,
        parts_ms={name: ns / timed / MS for name, ns in parts.most_common()},
    )


def render_text(result: StepCostResult) -> str:
    """Both totals, their ratio, and the parts."""
    return "\n".join([*_summarise(result), "", _tabulate(result).to_text()])


def render_markdown(result: StepCostResult) -> str:
    """Render the same as a page."""
    lines = ["# What a step costs", "", *_summarise(result), "", _tabulate(result).to_markdown(), ""]
    return "\n".join([*lines, cite_environment(result.environment)]) + "\n"


def _summarise(result: StepCostResult) -> list[str]:
    cost, speedup = (
        f"{value:.2f} ({NO_INTERVAL})" if interval is None else f"{value:.2f} (95% {interval[0]:.2f}–{interval[1]:.2f})"
        for value, interval in ((result.cost, result.cost_ci95), (result.speedup, result.speedup_ci95))
    )
    drawn = f"at temperature {result.temperature:g}, drafts {result.draft_sampling}" if result.temperature else "greedy"
    compared = "" if result.differing is None else f"; {result.differing} of {result.prompts} prompts differ"
    return [
        f"{result.model}, drafter {result.draft}: {result.prompts} prompts × {result.max_tokens} tokens, one at a time,"
        f" {drawn}; processor time of the engine's process.",
        f"A step with drafts costs {cost} plain ones and commits {result.drafted.tokens_per_step:.2f} tokens:"
        f" {speedup} times as many tokens per second{compared}.",
    ]


def _tabulate(result: StepCostResult) -> Table:
    plain, drafted = result.plain, result.drafted
    names = [*drafted.parts_ms, *(name for name in plain.parts_ms if name not in drafted.parts_ms)]
    rows = [["a step", f"{plain.step_ms:.3f}", f"{drafted.step_ms:.3f}", f"{drafted.step_ms - plain.step_ms:+.3f}"]]
    for name in names:
        one, other = plain.parts_ms.get(name), drafted.parts_ms.get(name)
        difference = f"{(other or 0) - (one or 0):+.3f}"
        rows.append([name, *("–" if ms is None else f"{ms:.3f}" for ms in (one, other)), difference])
    return Table("lrrr", ["ms of processor time per step", plain.label, drafted.label, "difference"], rows)
