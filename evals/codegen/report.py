"""The result of an evaluation on code problems for people: a table for a terminal, and a page. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from laguna_serve.evals.codegen.pass_at_k import Estimate
from laguna_serve.evals.codegen.result import CodeTasksResult
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

DETAIL_CHARS = 60


def render_text(result: CodeTasksResult) -> str:
    """Render a row per problem, then the figures."""
    return "\n".join([_tabulate(result, DETAIL_CHARS).to_text(), "", *list_figures(result)])


def list_figures(result: CodeTasksResult) -> list[str]:
    """pass@k and reward in sentences, or why there are none."""
    if result.refused:
        return [f"No figures: {result.refused[0].reason}."]
    lines = [f"{name} {value.point:.3f}, {_show_interval(value)}" for name, value in _name_figures(result).items()]
    endings = ", ".join(f"{count} {status}" for status, count in sorted(result.statuses.items()))
    lines.append(f"Samples: {endings}; {result.truncated} cut off at max_tokens")
    lines += [f"Programs ran behind: {walls} ({count} of them)" for walls, count in sorted(result.walls.items())]
    if result.not_judged:
        lines.append(f"{result.not_judged} could not be judged (unjudged, fault): counted as not passed, not as wrong")
    return lines


def _name_figures(result: CodeTasksResult) -> dict[str, Estimate]:
    named = {f"pass@{k}": value for k, value in (result.pass_at_k or {}).items()}
    named |= {f"pass@{k} as published": value for k, value in (result.published_pass_at_k or {}).items()}
    named |= {f"pass@{k} of the base tests": value for k, value in (result.base_pass_at_k or {}).items()}
    return named | ({} if result.reward is None else {"reward": result.reward})


def render_markdown(result: CodeTasksResult) -> str:
    """Render the same as a page."""
    work = result.workload
    kind = "greedy" if not work.temperature else f"temperature {work.temperature:g}, seed {work.seed}"
    scope = f"{work.samples} samples of each, {kind}, {work.form} form,"
    scope += f" protocol {work.protocol}{_show_template(work.template)}, at most {work.max_tokens} tokens."
    root = "" if result.root is None else f" (from {result.root})"
    lines = [
        "# Code problems",
        "",
        f"{result.model}{root} on {len(result.problems)} problems of {result.problems_file}; {scope}",
        "",
        *(f"- {line}" for line in list_figures(result)),
        "",
        _tabulate(result).to_markdown(),
    ]
    return "\n".join([*lines, "", cite_environment(result.environment)]) + "\n"


def _tabulate(result: CodeTasksResult, most: int | None = None) -> Table:
    """Tabulate the problems, with at most so many characters of what went wrong."""
    rows = [
        (
            row.task_id,
            f"{row.passed}/{row.samples}",
            "–" if row.reward is None else f"{row.reward:.2f}",
            " ".join(row.detail.split())[:most],
        )
        for row in result.problems
    ]
    return Table("lrrl", ("problem", "passed", "reward", "first failure"), rows)


def _show_interval(value: Estimate) -> str:
    if value.ci95 is None:
        return value.method
    return f"95% interval {value.ci95[0]:.3f}–{value.ci95[1]:.3f} ({value.method})"


def _show_template(template: Mapping[str, object]) -> str:
    return "".join(f", {name} {value}" for name, value in template.items())
