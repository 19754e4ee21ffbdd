"""A drafter's acceptance by γ and position, with thinking on and off: the file that is published for a model.

Prompts are asked through the target's own chat template; each γ is an A/B against plain decoding (bench/gamma_sweep.py,
whose folders, thinking-on and thinking-off, are in DIR, and which the same command continues). DIR gets
acceptance.json (schema laguna_serve.acceptance_curve/1) and acceptance.md. The format: docs/speculation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.bench.acceptance.result import AcceptanceCurve, Curve, CurvePoint
from laguna_serve.bench.arms.drafters import BeyondBlock, Sequential, TimedDrafterConfig
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.gamma.result import SweepPoint
from laguna_serve.bench.gamma_sweep import sweep
from laguna_serve.bench.harness.prompts import Thinking
from laguna_serve.serving.checkpoint import name_checkpoint
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, print_result, run_command
from laguna_serve.serving.kit.environment import OtherLoad, cite_environment, current_argv, read_environment
from laguna_serve.serving.kit.files import hash_file, write_text
from laguna_serve.serving.kit.flags import Flag, parse_numbers, read_flags_and_json
from laguna_serve.serving.kit.results import to_json, write_result
from laguna_serve.serving.kit.run_dir import check_out
from laguna_serve.serving.kit.tables import Table

EXAMPLES = """
examples:
  python bench/acceptance --model tests/toy/teacher --draft tests/toy/dflash --gammas 3,7 \\
      --prompts tests/toy/prompts.jsonl --out out/acceptance
  python bench/acceptance --model poolside/Laguna-XS.2 --draft poolside/Laguna-XS.2-speculator.dflash \\
      --gammas 3,5,7 --prompts bench/prompts/mixed.jsonl --num-prompts 14 --max-tokens 512 --out out/acceptance

exit status: 0 every γ was measured, 1 one was not or a divergence is a defect, 2 could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig(TimedDrafterConfig):
    """Which γ, asked how; the files go to `out`."""

    prompts: Annotated[
        Path, Flag('JSONL, one {"prompt": "…"} or {"messages": […]} per line', metavar="FILE", group="what to measure")
    ]
    thinking: Annotated[
        tuple[Thinking, ...],
        Flag("what the chat template is given as enable_thinking (default: on,off)", metavar="T,…"),
    ] = ("on", "off")
    gammas: Annotated[
        tuple[int, ...] | None,
        Flag("γ to measure (default: 1 to the drafter's block − 1)", metavar="N,…", at_least=1, parse=parse_numbers),
    ] = None
    num_prompts: Annotated[int, Flag("the first N prompts (default: 32)", metavar="N", at_least=8)] = 32
    max_tokens: Annotated[int, Flag("output tokens per prompt (default: 96)", metavar="N", at_least=1)] = 96
    beyond_block: BeyondBlock = False
    sequential: Sequential = None
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    def make_sweep(self, thinking: Thinking) -> SweepConfig:
        """Make the sweep of one setting of the template."""
        return SweepConfig(
            model=self.model,
            draft=self.draft,
            dtype=self.dtype,
            seed=self.seed,
            eager=self.eager,
            kv_cache_gib=self.kv_cache_gib,
            prompts=self.prompts,
            chat=True,
            thinking=thinking,
            gammas=self.gammas,
            beyond_block=self.beyond_block,
            num_prompts=self.num_prompts,
            max_tokens=self.max_tokens,
            sequential=self.sequential,
            out=self.out / f"thinking-{thinking}",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        AcceptanceConfig, argv, prog="bench/acceptance", description=__doc__, epilog=EXAMPLES
    )

    def run() -> int:
        result, held = measure_curves(config)
        print_result(tabulate(result).to_text(), to_json(result), config.out, always_json=always_json)
        return HELD if held else FELL_SHORT

    return run_command("acceptance", run, measures=True, interrupted=CONTINUES)


def measure_curves(config: AcceptanceConfig) -> tuple[AcceptanceCurve, bool]:
    """Sweep γ with each setting of the template, and write acceptance.json and acceptance.md to `config.out`.

    Returns the curves, and whether every γ was measured and none is defective. Raises as `gamma_sweep.sweep`.
    """
    check_out(config.out)
    environment, load = read_environment(current_argv()), OtherLoad()
    curves, dtypes, held = [], [], True
    for thinking in dict.fromkeys(config.thinking):
        swept = sweep(config.make_sweep(thinking))
        held &= swept.held
        dtypes.append(swept.points[0].parity.dtype)
        curves.append(Curve(thinking=thinking, points=[describe_point(point) for point in swept.points]))
    result = AcceptanceCurve(
        environment=load.note(environment),
        model=name_checkpoint(config.model),
        draft=name_checkpoint(config.draft),
        prompts_file=str(config.prompts),
        prompts_sha256=hash_file(config.prompts),
        num_prompts=config.num_prompts,
        max_tokens=config.max_tokens,
        dtype=dtypes[0],
        curves=curves,
    )
    write_result(config.out / "acceptance.json", result)
    write_text(config.out / "acceptance.md", render_markdown(result))
    return result, held


def describe_point(point: SweepPoint) -> CurvePoint:
    """Describe what the drafter did at a point of a sweep."""
    return CurvePoint(
        gamma=point.gamma,
        tau=point.tau,
        per_position=point.per_position,
        speedup=point.speedup,
        ci95=point.ci95,
        prompts=point.parity.prompts,
        differing=point.parity.mismatches,
        beyond_block=point.beyond_block,
    )


def tabulate(result: AcceptanceCurve) -> Table:
    """Tabulate the curves, a row per setting and γ."""
    rows = [
        [
            *(curve.thinking or "default", str(point.gamma), f"{point.tau:.2f}"),
            *(" ".join(f"{share:.0%}" for share in point.per_position), f"{point.speedup:.2f}×"),
            "–" if point.differing is None else f"{point.differing} of {point.prompts}",
        ]
        for curve in result.curves
        for point in curve.points
    ]
    return Table("lrrlrr", ("thinking", "γ", "τ", "accepted by position", "speed-up", "prompts that differ"), rows)


def render_markdown(result: AcceptanceCurve) -> str:
    """Render the curves as a page."""
    prompts = f"{result.num_prompts} prompts × {result.max_tokens} tokens of {Path(result.prompts_file).name}"
    return "\n".join(
        [
            f"# Acceptance of {result.draft} for {result.model}",
            "",
            f"{prompts}, through the chat template, greedy, one at a time, {result.dtype}. τ: tokens per step.",
            "",
            tabulate(result).to_markdown(),
            "",
            cite_environment(result.environment),
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
