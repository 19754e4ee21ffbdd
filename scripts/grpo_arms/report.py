"""The arms as a table, for people."""

from __future__ import annotations

from msgspec import structs

from laguna_serve.scripts.grpo_arms.result import BAR, Arm, ArmsResult, ArmSummary
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

NAMES: dict[Arm, str] = {"frozen": "frozen drafter", "refreshed": "refreshed drafter", "none": "no drafter"}
HEAD = (
    "arm",
    "seed",
    "held-out reward",
    "τ first → last",
    "greedy τ first → last",
    "tokens per core-second",
    "with refreshes",
    "refreshes' share",
    "to the goal: seconds (core-seconds)",
    "drafters pushed, refused, taken back",
)


def render_markdown(result: ArmsResult) -> str:
    """Render the table, the gains, and where it was measured."""
    table = Table("lr" + "l" * (len(HEAD) - 2), HEAD, list(map(_list_cells, result.summaries))).to_markdown()
    gains = ", ".join(f"{gain:.2f} (seed {seed})" for seed, gain in result.gains.items()) or "not measured"
    said = f"(τ − 1) of the refreshed drafter ÷ that of the frozen one at the last versions: {gains}; the bar is {BAR}."
    loads = [run.environment.other_load for run in result.runs if run.environment.other_load is not None]
    shared = f" Others took {min(loads):.0%} to {max(loads):.0%} of the processors' time." if loads else ""
    begun: dict[str, str] = {}  # runs of one command, the first of them
    for run in result.runs:
        begun.setdefault(cite_environment(structs.replace(run.environment, date="")), cite_environment(run.environment))
    cited = "\n\n".join(begun.values())
    return f"The goal is a held-out reward of {result.goal:g}.\n\n{table}\n\n{said}{shared}\n\n{cited}\n"


def _list_cells(summary: ArmSummary) -> tuple[str, ...]:
    reward = f"{summary.held_out_reward[0]:.3f} → {summary.held_out_reward[1]:.3f}"
    goal = "not reached"
    if summary.seconds_to_goal is not None:
        goal = f"{summary.seconds_to_goal:.0f} ({summary.core_s_to_goal:.0f})"
    drafters = f"{summary.pushed}, {summary.refused}, {summary.rolled_back}" if summary.arm == "refreshed" else "–"
    return (
        NAMES[summary.arm],
        str(summary.seed),
        reward,
        _show(summary.tau_first, summary.tau_last),
        _show(summary.greedy_first, summary.greedy_last),
        f"{summary.tokens_per_core_s:.0f}",
        f"{summary.with_refresh_per_core_s:.0f}",
        f"{summary.refresh_share:.0%}",
        goal,
        drafters,
    )


def _show(first: float | None, last: float | None) -> str:
    return "–" if first is None or last is None else f"{first:.2f} → {last:.2f}"
