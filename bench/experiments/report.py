"""A campaign for people: its plan, what came of it as text and as a page, and the list that it is taken from."""

from __future__ import annotations

import shlex
from collections import Counter

from laguna_serve.bench.experiments.result import CampaignPlan, CampaignResult, StepRun
from laguna_serve.bench.experiments.step import Step, fill
from laguna_serve.bench.experiments.steps import STEPS
from laguna_serve.serving.kit.environment import list_environment
from laguna_serve.serving.kit.tables import Table

BY_NAME: dict[str, Step] = {step.name: step for step in STEPS}
SYNTHETIC = "synthetic acceptance"
MOST_FIGURES = 12
TODO_HEAD = """# What to run first on a GPU

Nothing here has been run on a GPU yet. `python bench/campaign.py --budget-min 25 --out out/campaign` runs it in this
order, as much as fits, and continues where it stopped; `--plan` prints what fits. Written from the campaign's steps
(`bench/experiments/`) by `python bench/campaign.py --write-todo bench/results/GPU_TODO.md`; rows keep their numbers.
Commit the campaign's folder beside this file, also when it disappoints.
"""
# As a person would write them.
SHORT = {
    "{python}": "python",
    "{out}": "DIR",
    "{toy}": "tests/toy/teacher",
    "{draft}": "tests/toy/dflash",
    "{prompts}": "tests/toy/prompts.jsonl",
    "{xs2}": "XS2",
    "{xs2-draft}": "XS2-drafter",
    "{xs2-pruned}": "XS2-10pct",
}


def render_plan(plan: CampaignPlan) -> str:
    """Render what fits into the budget, in order, and what is left out."""
    elapsed, rows, left = 0, [], []
    for item in plan.steps:
        if item.left_out is not None:
            left.append([item.step, item.part, str(item.row), str(item.estimate_s), item.left_out])
            continue
        elapsed += item.estimate_s
        note = SYNTHETIC if item.synthetic else ""
        rows.append([item.step, item.part, str(item.row), str(item.estimate_s), str(elapsed), str(item.limit_s), note])
    heads = ("step", "part", "row", "est. s", "until s", "limit s", "")
    head = (
        f"{plan.planned_s} of {plan.budget_s:.0f} s planned, {len(rows)} steps (estimates for one H100, none measured)"
    )
    if plan.rehearsed:
        head = f"{len(rows)} steps rehearsed, for {plan.budget_s:.0f} s at most (the seconds below are of an H100)"
    lines = [
        head,
        "",
        Table("llrrrrl", heads, rows).to_text(),
    ]
    if left:
        lines += ["", "left out:", "", Table("llrrl", ("step", "part", "row", "est. s", "why"), left).to_text()]
    return "\n".join(lines)


def render_text(result: CampaignResult) -> str:
    """Render a line per step that was run, and how many were not."""
    lines = [_summarise(result), "", _tabulate(result).to_text()]
    if result.left_out:
        lines += ["", f"not run: {', '.join(result.left_out)} (campaign.md says why)"]
    return "\n".join(lines)


def render_markdown(result: CampaignResult) -> str:
    """Render the page: a table, then per step what was run, what was expected and what came out."""
    title = "Rehearsal of the campaign (toy sizes on a CPU: nothing here is a measurement)"
    lines = [f"# {title if result.rehearsed else 'GPU campaign'}", "", _summarise(result), ""]
    lines += [_tabulate(result).to_markdown(), ""]
    for run in result.last_runs.values():
        lines += _describe_run(run)
    if result.left_out:
        table = Table("lll", ("step", "expected", "why not"), [_list_left(*item) for item in result.left_out.items()])
        lines += ["## Not run", "", table.to_markdown(), ""]
    return "\n".join([*lines, "## Where and how", "", *list_environment(result.environment)]) + "\n"


def _summarise(result: CampaignResult) -> str:
    counts = Counter(run.outcome for run in result.last_runs.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none"
    ended = "; interrupted" if result.interrupted else ""
    time = f"{result.used_s:.0f} of {result.budget_s:.0f} s in the last run"
    return f"{len(result.last_runs)} steps run: {outcomes}; {len(result.left_out)} not run; {time}{ended}."


def _tabulate(result: CampaignResult) -> Table:
    rows = [
        [run.step, run.outcome, f"{run.wall_s:.0f}", "–" if run.rehearsed else str(run.estimate_s), _label(run)]
        for run in result.last_runs.values()
    ]
    return Table("llrrl", ("step", "outcome", "took, s", "estimate, s", "first figures"), rows)


def _label(run: StepRun) -> str:
    step = BY_NAME.get(run.step)
    shown = "; ".join(run.figures[:2]) or run.reason or ""
    return f"[{SYNTHETIC}] {shown}" if step is not None and step.synthetic and not run.rehearsed else shown


def _describe_run(run: StepRun) -> list[str]:
    step = BY_NAME.get(run.step)
    lines = [f"## {run.step}: {run.outcome}", "", f"`{shlex.join(run.command)}`", ""]
    if step is not None:
        lines += [f"- expected: {step.expected}"]
    if step is not None and step.synthetic and not run.rehearsed:
        lines += [f"- **{SYNTHETIC}**: tokens per step are prescribed, not measured"]
    lines += [f"- {'rehearsed' if run.rehearsed else 'came out'}: {figure}" for figure in run.figures[:MOST_FIGURES]]
    if len(run.figures) > MOST_FIGURES:
        lines += [f"- and {len(run.figures) - MOST_FIGURES} more in the file"]
    if run.reason is not None:
        lines += [f"- why: {run.reason}"]
    estimate = "" if run.rehearsed else f" of {run.estimate_s} s estimated"
    lines += [
        f"- took {run.wall_s:.0f} s{estimate}, from {run.started} on {run.device}, commit {run.commit or 'unknown'}"
    ]
    return [*lines, f"- files: [{run.folder}]({run.folder}), [log]({run.folder}.log)", ""]


def _list_left(name: str, reason: str) -> list[str]:
    step = BY_NAME.get(name)
    return [name, "" if step is None else step.expected, reason]


def render_todo() -> str:
    """bench/results/GPU_TODO.md, the whole list."""
    # A person's time is not estimated.
    rows = [
        [str(step.row), step.name, "–" if step.by_hand else str(step.estimate_s), step.expected, step.why]
        for step in STEPS
    ]
    table = Table("rlrll", ("#", "step", "est. s", "expected", "why"), rows)
    lines = [TODO_HEAD, table.to_markdown(), "", "## Commands", ""]
    lines += [f"- {step.name}: {show_command(step)}" for step in STEPS]
    return "\n".join(lines) + "\n"


def show_command(step: Step) -> str:
    """Show a command as code, or what a person is to do in words."""
    if step.by_hand:
        return step.by_hand
    words = [f'"{word}"' if " " in word else word for word in fill(step.command, SHORT)]
    return f"`{' '.join(words).replace('|', chr(92) + '|')}`"
