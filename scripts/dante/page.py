"""The ablation as a table in Markdown and as a picture: what is gained beside what is forgotten."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.scripts.dante.arms import BASE, FULL, OTHER, SFT, TEACHER, AblationResult, Gain
from laguna_serve.serving.kit.figures import BAD, FAINT, GOOD, INK, SOFT, note_source, open_figure, style_axes
from laguna_serve.serving.kit.tables import Table

NAMES = {
    BASE: "initialisation",
    SFT: "plain fine-tuning",
    "no-cwce": "without CWCE",
    "no-tea": "without TEA",
    "no-curriculum": "without the curriculum",
    FULL: "full",
    "tea-sum": "full, TEA as printed",
}
LEGEND = {TEACHER: ("the teacher's answers to other prompts", GOOD), OTHER: ("other text: above 0 is forgotten", BAD)}


def format_ablation(result: AblationResult) -> str:
    """Format every arm and every bar as tables in Markdown."""
    drifts = {arm.name: sum(arm.drift) / len(arm.drift) for arm in result.arms}
    rows = [
        (
            NAMES[name],
            f"{level[TEACHER]:.3f}",
            _show(result.find(name, BASE, TEACHER)),
            f"{level[OTHER]:.3f}",
            _show(result.find(name, BASE, OTHER)),
            _show(result.find(name, SFT, OTHER)),
            f"{drifts[name]:.1e}" if name in drifts else "",
        )
        for name, level in result.level.items()
    ]
    heads = ("nats per byte", "teacher's text", "over base", "other text", "over base", "over sft", "drift")
    arms = Table("lrrrrrr", heads, rows).to_markdown()
    bars = [(bar.what, f"{bar.measured:+.3f}", "yes" if bar.met else "no") for bar in result.bars]
    caption = f"{result.steps} steps of {result.batch} rows, {_count_seeds(result)}; 95% intervals over texts and seeds"
    return f"{arms}\n\n{Table('lrl', ('bar', 'measured', 'met'), bars).to_markdown()}\n\n{caption}."


def draw_ablation(result: AblationResult, path: Path) -> None:
    """Write differences from the initialisation as a PNG, a row per arm."""
    names = [name for name in result.level if name != BASE]
    with open_figure(path, figsize=(8.2, max(3.6, 1.9 + 0.5 * len(names)))) as (figure, axes):
        figure.subplots_adjust(left=0.25, right=0.96, top=0.8, bottom=0.2)
        for text, (label, color) in LEGEND.items():
            shift = 0.12 if text == OTHER else -0.12
            gains = [result.find(name, BASE, text) for name in names]
            shown = [(place, gain) for place, gain in enumerate(gains) if gain is not None]
            axes.errorbar(
                [gain.delta for _, gain in shown],
                [place + shift for place, _ in shown],
                xerr=[[g.delta - g.low for _, g in shown], [g.high - g.delta for _, g in shown]],
                fmt="o",
                color=color,
                markersize=5,
                elinewidth=1.1,
                label=label,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        style_axes(axes, "What each part of DANTE does", "nats per byte over the initialisation; bars: 95%")
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.tick_params(axis="y", colors=INK)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, labelcolor=SOFT)
        source = f"{result.steps} steps × {result.batch} rows, {_count_seeds(result)}"
        note_source(figure, 0.03, [source, result.environment.cpu or "", result.environment.date[:10]])


def _count_seeds(result: AblationResult) -> str:
    return "1 seed" if result.seeds == 1 else f"{result.seeds} seeds"


def _show(gain: Gain | None) -> str:
    return "" if gain is None else f"{gain.delta:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
