"""Draw what pruning does: scores layer by layer, the share pruned of each layer, and benchmarks by share.

--masks is a folder that score_experts.py wrote, or the published artefacts: atomic_scores.npy and keep masks are read,
and summary.json where it is ours. --suites are results of evals/suites.py, each of a model pruned by that share.
Writes scores.png, layers.png, suites.png (of what was given) and insights.json to --out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.insights.artefacts import ArtefactInsights, read_insights
from laguna_serve.scripts.insights.sensitivity import SuiteCurve, SuiteError, read_curves
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.flags import Flag, FlagError
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out
from laguna_serve.serving.kit.tables import Table

EXAMPLES = """
examples:
  python scripts/insights --masks tests/toy/masks --out out/insights
  python scripts/insights --suites 0=base/suites.json 0.1=p10/suites.json 0.25=p25/suites.json --out out/insights
  python scripts/insights --masks DIR --suites 0=all/suites.json#base 0.1=all/suites.json#pruned --out out/insights

exit status: 0 drawn, 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class InsightsConfig:
    """What to draw, and where to."""

    masks: Annotated[Path | None, Flag("folder with atomic_scores.npy and group_keep_mask_*pct.npy", metavar="DIR")] = (
        None
    )
    suites: Annotated[
        tuple[str, ...],
        Flag("suites.json by share of pruned groups; #COLUMN of several models", metavar="SHARE=FILE", several=True),
    ] = ()
    out: Annotated[Path, Flag("folder for the pictures", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        if self.masks is None and not self.suites:
            raise FlagError("--masks or --suites: expected one of them at least, got neither; pass what to draw")


class InsightsResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_insights/1"
):
    """What the pictures show, in figures; `pictures`: their names below --out."""

    artefacts: ArtefactInsights | None
    suites: tuple[SuiteCurve, ...]
    pictures: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/insights", InsightsConfig, __doc__, EXAMPLES, others=(PruningError,))
    return command.run(argv, draw_insights, show=format_insights)


def draw_insights(config: InsightsConfig) -> InsightsResult:
    """Read everything, then draw.

    Raises:
        PruningError, SuiteError, ResultError: artefacts or results that cannot be used.
    """
    check_out(config.out)
    artefacts = read_insights(config.masks) if config.masks is not None else None
    curves = read_curves(config.suites)
    if config.suites and not curves:
        expected = "a suite and metric that two files at least have"
        raise SuiteError(f"--suites: expected {expected}, got none; pass results of the same suites")
    from laguna_serve.scripts.insights.plots import draw_scores, draw_shares, draw_suites

    config.out.mkdir(parents=True, exist_ok=True)
    pictures = []
    if artefacts is not None:
        draw_scores(artefacts, config.out / "scores.png")
        draw_shares(artefacts, config.out / "layers.png")
        pictures += ["scores.png", "layers.png"]
    if curves:
        draw_suites(curves, config.out / "suites.png")
        pictures.append("suites.png")
    result = InsightsResult(artefacts=artefacts, suites=curves, pictures=tuple(pictures))
    write_result(config.out / "insights.json", result)
    return result


def format_insights(result: InsightsResult) -> str:
    """Format tables: the layers' median scores and pruned shares, the suites' values."""
    parts = []
    if (found := result.artefacts) is not None:
        rows = [
            [str(layer.layer), f"{layer.quantiles[2]:.2f}" if layer.quantiles else "–", *map(_percent, layer.pruned)]
            for layer in found.layers
        ]
        heads = ["layer", "median, log10", *(f"{ratio:.0%} pruned" for ratio in found.ratios)]
        parts.append(Table("r" * len(heads), heads, rows).to_text())
    for curve in result.suites:
        shown = ", ".join(f"{point.ratio:.0%} {point.value:.4f}" for point in curve.points)
        note = f" († {', '.join(curve.differ)} differ)" if curve.differ else ""
        parts.append(f"{curve.suite} {curve.metric}: {shown}{note}")
    return "\n".join(parts)


def _percent(share: float) -> str:
    return f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
