"""A γ sweep for people: as text and as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = ("concurrency", "γ", "speed-up", "95% interval", "predicted", "τ", "step cost", "differ")


def render_text(result: dict[str, Any]) -> str:
    """Every point in columns, then what was chosen."""
    rows = [list(COLUMNS), *map(_cells, result["points"])]
    lines = ["{:>11} {:>3} {:>9} {:>14} {:>9} {:>6} {:>9} {:>9}".format(*row) for row in rows]
    lines.append("")
    lines += _conclusions(result)
    return "\n".join(lines)


def render_markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    work, environment = result["workload"], result["environment"]
    lines = [
        "# γ sweep",
        "",
        f"{result['model']}, drafter {result['draft']}; {work['num_prompts']} prompts × {work['max_tokens']} tokens of"
        f" {work['prompts']}, greedy. Each point is an A/B against plain decoding, both engines up and taking turns;"
        " the prediction is τ ÷ step cost from the largest γ's acceptance and a line through the costs, without the"
        " time that prompts take.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {' | '.join(_cells(point))} |" for point in result["points"]]
    lines += ["", *(f"- {line}" for line in _conclusions(result)), "", "![the sweep](sweep.png)", ""]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    lines.append(f"`{environment['command']}` on {where}; {versions}.")
    return "\n".join(lines) + "\n"


def _cells(point: dict[str, Any]) -> list[str]:
    low, high = point["ci95"]
    parity = point["parity"]
    return [
        str(point["concurrency"]),
        str(point["gamma"]),
        f"{point['speedup']:.2f}×",
        f"{low:.2f}–{high:.2f}",
        f"{point['predicted']:.2f}×",
        f"{point['tau']:.2f}",
        f"{point['step_cost']:.2f}",
        f"{parity['mismatches']} of {parity['prompts']}",
    ]


def _conclusions(result: dict[str, Any]) -> list[str]:
    lines = []
    for choice in result["choices"]:
        what = f"γ {choice['gamma']}" if choice["gamma"] else "plain decoding"
        lines.append(f"concurrency {choice['concurrency']}: {what}; {choice['reason']}")
    for concurrency, cost in result["cost"].items():
        lines.append(
            f"concurrency {concurrency}: a step with γ drafted tokens costs {1 + cost['fixed']:.2f} + "
            f"{cost['per_token']:.3f}·γ plain steps"
        )
    for gamma, reason in result["failed"].items():
        lines.append(f"γ {gamma} failed: {reason}")
    lines.append(f"schedule: {result['schedule']}")
    return lines
