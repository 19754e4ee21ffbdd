"""The toy drafters' training as a picture: tokens per step, as verification would accept them, over the steps.

python -m laguna_serve.scripts.training.toy.plot tests/toy/training.json --out drafters.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from matplotlib.axes import Axes

from laguna_serve.scripts.training.figure import draw_figure
from laguna_serve.serving.kit.cli import HELD, run_command
from laguna_serve.serving.kit.flags import Flag, read_flags
from laguna_serve.serving.kit.results import JsonObject

COLORS = {"dflash": "#0b7a75", "dflash-speculators": "#c2410c"}
LABELS = {"dflash": "Laguna\n2 layers, 4 taps", "dflash-speculators": "speculators\n1 layer, 3 taps"}


def draw_drafters(logs: JsonObject, path: Path) -> None:
    """Draw τ over the steps; `logs` is training.json's object: for every drafter records of step and tau."""

    def curves(axes: Axes) -> None:
        for name, color in COLORS.items():
            log = logs[name]
            axes.plot([r["step"] for r in log], [r["tau"] for r in log], color=color, linewidth=1.4)
            last = log[-1]["tau"]
            label = f"{LABELS[name]}\n{last:.2f}"
            axes.annotate(label, (1.01, last), xycoords=("axes fraction", "data"), color=color, va="center", size=8.5)
        axes.set_ylim(bottom=1)

    title = "The toy drafters learn what the teacher will say"
    measure = "tokens per step at random places of the training text, of at most 8; in service it is less"
    draw_figure(path, title, measure, "scripts/make_toy.py, records of tests/toy/training.json", curves)


@dataclass(frozen=True, kw_only=True)
class DraftersPlotConfig:
    """Whose training, and where to."""

    log: Annotated[Path, Flag("training.json", positional=True)]
    out: Annotated[Path, Flag("PNG to write")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(DraftersPlotConfig, argv, prog="laguna_serve.scripts.training.toy.plot", description=__doc__)

    def body() -> int:
        draw_drafters(json.loads(config.log.read_text(encoding="utf-8")), config.out)
        return HELD

    return run_command("plot.py", body)


if __name__ == "__main__":
    sys.exit(main())
