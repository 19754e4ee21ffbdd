"""GRPO runs as a picture: the held-out reward over the steps, a line per run.

python -m laguna_serve.scripts.training.rl.plot out/grpo-0 out/grpo-1 out/grpo-2 --out reward.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from matplotlib.axes import Axes

from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.scripts.training.rl.steps import Step
from laguna_serve.serving.kit.cli import HELD, run_command
from laguna_serve.serving.kit.figures import SOFT
from laguna_serve.serving.kit.flags import Flag, read_flags

COLOR = "#0b7a75"


def draw_runs(folders: Sequence[Path], path: Path) -> None:
    """Write a PNG of the runs' log.jsonl files."""
    logs = [[msgspec.json.decode(line, type=Step) for line in (f / "log.jsonl").open("rb")] for f in folders]

    def curves(axes: Axes) -> None:
        ends = []
        for log in logs:
            rewards = [(step.step, step.reward) for step in log if step.reward is not None]
            axes.plot(*zip(*rewards, strict=True), color=SOFT, lw=0.5, alpha=0.5)
            measured = [(step.step, step.held_out_reward) for step in log if step.held_out_reward is not None]
            held_out = [reward for _, reward in measured]
            axes.plot([number for number, _ in measured], held_out, color=COLOR, lw=1.8, marker="o", ms=3)
            ends.append(held_out[-1])
        axes.annotate(
            "held out",
            (1.01, sum(ends) / len(ends)),
            xycoords=("axes fraction", "data"),
            color=COLOR,
            va="center",
            size=8.5,
        )
        axes.set_ylim(0, 1)

    title = "GRPO through the engine: the policy learns to write lines of Python"
    measure = "share of lines written that are distinct lines of code; thin: the batches trained on"
    draw_figure(
        path, title, measure, f"scripts/grpo.py, {len(logs)} seeds" if len(logs) > 1 else "scripts/grpo.py", curves
    )


@dataclass(frozen=True, kw_only=True)
class RunsPlotConfig:
    """Which runs, and where to."""

    runs: Annotated[
        tuple[Path, ...], Flag("--out folders of scripts/grpo.py", metavar="DIR", positional=True, repeated=True)
    ]
    out: Annotated[Path, Flag("PNG to write")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(RunsPlotConfig, argv, prog="laguna_serve.scripts.training.rl.plot", description=__doc__)

    def body() -> int:
        draw_runs(config.runs, config.out)
        return HELD

    return run_command("plot.py", body)


if __name__ == "__main__":
    sys.exit(main())
