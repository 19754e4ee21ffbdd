"""GRPO runs as a picture: the held-out reward over the steps, a line per run.

python -m laguna_serve.scripts.training.rl.plot out/grpo-0 out/grpo-1 out/grpo-2 --out reward.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.serving.kit.figures import SOFT

COLOR = "#0b7a75"


def draw_runs(folders: Sequence[Path], path: Path) -> None:
    """Write a PNG of the runs' log.jsonl files."""
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in folders]

    def curves(axes: Axes) -> None:
        ends = []
        for log in logs:
            trained = [line for line in log if "reward" in line]
            axes.plot(
                [line["step"] for line in trained], [line["reward"] for line in trained], color=SOFT, lw=0.5, alpha=0.5
            )
            measured = [line for line in log if "held_out_reward" in line]
            held_out = [line["held_out_reward"] for line in measured]
            axes.plot([line["step"] for line in measured], held_out, color=COLOR, lw=1.8, marker="o", ms=3)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="--out folders of scripts/grpo.py")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    draw_runs(args.runs, args.out)


if __name__ == "__main__":
    main()
