"""The arms as a picture: reward, acceptance and rollout speed, against steps and against processor time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from laguna_serve.scripts.grpo_arms.report import NAMES
from laguna_serve.scripts.grpo_arms.result import Arm, ArmRun, ArmsResult, find_clock
from laguna_serve.scripts.training.rl.steps import Step
from laguna_serve.serving.kit.figures import BAD, GOOD, INK, SOFT, note_source, open_figure, style_axes

COLORS: dict[Arm, str] = {"frozen": BAD, "refreshed": GOOD, "none": INK}
Points = list[tuple[int, float]]  # (step, value)


def draw_arms(result: ArmsResult, path: Path) -> None:
    """Write a PNG; a line per run."""
    rows: tuple[tuple[str, str, Callable[[Step], float | None]], ...] = (
        ("The policy learns", "held-out reward", lambda step: step.held_out_reward),
        ("What is accepted", "τ of rollouts, tokens per step", lambda step: step.acceptance_length),
        ("What rollouts cost", "tokens per processor second of the engine", _find_speed),
    )
    with open_figure(path, 3, 2, figsize=(11, 11.5), sharey="row") as (figure, axes):
        figure.subplots_adjust(left=0.07, right=0.97, top=0.93, bottom=0.09, hspace=0.42, wspace=0.1)
        for (left, right), (title, measure, read) in zip(axes, rows, strict=True):
            for run in result.runs:
                _draw(left, right, run, [(s.step, value) for s in run.log if (value := read(s)) is not None])
            style_axes(left, title, measure)
            style_axes(right, "", "")
            left.set_xlim(left=0)  # when all lines are there: it ends the search for the other limit
            right.set_xlim(left=0)
        for run in {run.arm: run for run in result.runs}.values():
            axes[0][0].plot([], [], color=COLORS[run.arm], label=NAMES[run.arm])
        axes[0][0].legend(frameon=False, labelcolor=SOFT, loc="lower right")
        axes[2][0].set_xlabel("step")
        axes[2][1].set_xlabel("processor seconds of engine and trainer, without measurements")
        seeds = len({run.seed for run in result.runs})
        note_source(figure, 0.07, [f"scripts/grpo_arms, {seeds} seed{'s' if seeds > 1 else ''}"], bottom=0.02)


def _draw(left: Axes, right: Axes, run: ArmRun, points: Points) -> None:
    _, clock = find_clock(run.log)
    shown = [(step, value) for step, value in points if step < len(clock)]
    values = [value for _, value in shown]
    marker: dict[str, Any] = {"marker": "o", "ms": 3} if len(shown) < len(run.log) / 2 else {}
    style = {"color": COLORS[run.arm], "lw": 1.4, "alpha": 0.85, **marker}
    for axes, along in ((left, [step for step, _ in shown]), (right, [clock[step] for step, _ in shown])):
        axes.plot(along, values, **style)


def _find_speed(step: Step) -> float | None:
    if step.tokens is None or step.processor_s is None or not step.processor_s.rollouts:
        return None
    return step.tokens / step.processor_s.rollouts
