"""A prefix-cache result for people: as text and as Markdown."""

from __future__ import annotations

from typing import Any


def render_text(result: dict[str, Any]) -> str:
    """Scenarios, then comparisons with their verdicts, in columns."""
    lines = [f"{'scenario':<34} {'tokens/step':>11} {'drafts':>8} {'hits':>6} {'preempted':>9}"]
    lines += [
        f"{row['name']:<34} {_number(row['acceptance']):>11} {row['drafts']:>8,} {row['hit_rate']:>6.0%} "
        f"{row['preemptions']:>9}"
        for row in result["scenarios"]
    ]
    lines += ["", f"{'comparison':<34} {'ratio':>6} {'95% interval':>15} {'differ':>8}  verdict"]
    for row in result["comparisons"]:
        low, high = row["ci95"]
        differing = "sampled" if row["differing"] is None else str(row["differing"])
        columns = f"{row['name']:<34} {_number(row['ratio']):>6} {f'{low:.3f}–{high:.3f}':>15} {differing:>8}"
        lines.append(f"{columns}  {row['verdict']}")
    if result["partial"]:
        lines.append("partial: the run was interrupted")
    return "\n".join(lines)


def render_markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "# Acceptance under prefix caching",
        "",
        f"{result['model']}, drafter {result['draft']}; {result['max_tokens']} tokens per request, eager unless the"
        " command says otherwise. Ratios of acceptance lengths; intervals are bootstrapped over prompts (of a"
        " greedy group all copies together, sampled copies one by one).",
        "",
        "| comparison | ratio | 95% interval | prompts whose tokens differ | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in result["comparisons"]:
        low, high = row["ci95"]
        differing = "sampled" if row["differing"] is None else f"{row['differing']} of {row['pairs']}"
        lines.append(
            f"| {row['name']} | {_number(row['ratio'])} | {low:.3f}–{high:.3f} | {differing} | {row['verdict']} |"
        )
    lines += ["", "| scenario | tokens per step | drafts | prefix hits | preemptions |", "|---|---|---|---|---|"]
    for row in result["scenarios"]:
        lines.append(
            f"| {row['name']} | {_number(row['acceptance'])} | {row['drafts']:,} | {row['hit_rate']:.0%} "
            f"| {row['preemptions']} |"
        )
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    lines += ["", f"`{environment['command']}` on {where}; {versions}."]
    if result["partial"]:
        lines += ["", "Partial: the run was interrupted."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
