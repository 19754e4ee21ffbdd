"""What lies beside a taught student: its model card, and the curves of its training."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.scripts.dante.options import DanteResult
from laguna_serve.scripts.training.card import Card
from laguna_serve.serving.checkpoint import name_checkpoint
from laguna_serve.serving.kit.figures import BAD, GOOD, SOFT, note_source, open_figure, style_axes
from laguna_serve.serving.kit.tables import Table

CURVES = "training.png"

SUMMARY = """{base}, taught the answers of {teachers}: text alone, so that teacher and student share no vocabulary.
The method is DANTE-Mosaic's: answers that the teacher was sure of weigh more (CWCE), the embedding is held near where
it was (TEA), and rows come from easy to hard."""

USE = """```sh
laguna serve {name}
python evals/suites.py --help        # the suites of its card; run its initialisation, {base}, beside it
```"""

LIMITS = """- Its training's own loss is all that was measured. Whether it gained, and what it forgot, is seen beside
  its initialisation: `scripts/dante ablate` and `evals/` measure both.
- {cut} of the {rows} rows were cut off and do not teach where to stop."""


def write_curves(result: DanteResult, path: Path) -> None:
    """Draw cross entropy and loss, and below them how the rows weighed and the embedding's drift."""
    steps = [step.step for step in result.log]
    with open_figure(path, rows=3, figsize=(7.5, 7.2), sharex=True, height_ratios=(3, 2, 2)) as (figure, axes):
        figure.subplots_adjust(left=0.1, right=0.78, top=0.9, bottom=0.11, hspace=0.3)
        loss, weight, drift = axes
        panels = (
            (loss, "cross_entropy", "cross entropy", GOOD),
            (loss, "loss", "loss", SOFT),
            (weight, "weight", "weight", GOOD),
            (drift, "drift", "drift", BAD),
        )
        for panel, name, label, color in panels:
            values = [getattr(step, name) for step in result.log]
            panel.plot(steps, values, color=color, linewidth=1.4)
            panel.annotate(
                f"{label}: {values[-1]:.3g}",
                (1.01, values[-1]),
                xycoords=("axes fraction", "data"),
                color=color,
                va="center",
                size=8.5,
            )
        loss.set_ylim(bottom=0)
        style_axes(loss, "What the student learned", "nats per token of the answers; the loss has λ, weights and TEA")
        style_axes(weight, "", "w(H) of the step's rows: how much the teacher's confidence counts")
        style_axes(drift, "", "squared drift of the embedding, over its initialisation's norm")
        drift.set_xlabel("step")
        note_source(figure, 0.1, [name_checkpoint(result.model), result.environment.device_name])


def describe_taught(result: DanteResult, teachers: list[str], folder: Path) -> Card:
    """Describe a student from its result; `folder` is where it was written."""
    recipe = [(name.replace("_", " "), str(value)) for name, value in result.objective.items()]
    recipe += [("rows", str(result.rows)), ("epochs", str(result.epochs)), ("minutes", str(result.minutes))]
    base, name = name_checkpoint(result.model), folder.resolve().name
    return Card(
        title=name,
        summary=SUMMARY.format(base=base, teachers=", ".join(teachers)),
        base=result.model,
        tags=("distillation", "cross-tokenizer", "dante"),
        sections={
            "The training": Table("lr", ("", ""), result.list_figures()).to_markdown(),
            "Use": USE.format(name=name, base=base),
            "Recipe": Table("lr", ("", ""), recipe).to_markdown(),
            "What is not known": LIMITS.format(cut=result.cut, rows=result.rows),
        },
        environment=result.environment,
        figures={CURVES: "Cross entropy, weights and drift"},
    )
