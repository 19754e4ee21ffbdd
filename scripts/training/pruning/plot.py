"""The loss curve as a picture: ranked masks against random ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from laguna_serve.evals.perplexity.pruning_plot import draw_added_loss
from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.scripts.training.pruning.curve import CurveResult


def draw_curve(result: CurveResult, path: Path) -> None:
    """Write the PNG: what pruning adds to the loss, with every random draw as a dot."""
    base, points, text = result.unpruned, result.points, result.text
    seeds, date = len(points[0].random), result.environment.date[:10]
    source = f"{text.targets:,} tokens of {text.source}  ·  {seeds} random seeds  ·  {date}"
    measure = f"nats per token, above {base:.4f} unpruned; every dot is one random mask"
    curves = partial(
        draw_added_loss,
        shares=[point.ratio for point in points],
        ranked=[point.ranked - base for point in points],
        random=[[loss - base for loss in point.random] for point in points],
    )
    draw_figure(path, "What pruning adds to the held-out loss", measure, source, curves, along="groups pruned")
