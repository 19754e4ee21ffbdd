"""A γ sweep for people: as text and as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = ("concurrency", "γ", "speed-up", "95% interval", "predicted", "τ", "step cost", "drafter", "differ")
LEVER_COLUMNS = ("lever", "γ", "own", "95% interval", "τ", "own differ", "plain differ", "loss", "GiB plain / with")


def render_text(result: dict[str, Any]) -> str:
    """Every point in columns, then what was chosen."""
    rows = [list(COLUMNS), *map(_cells, result["points"])]
    lines = ["{:>11} {:>3} {:>9} {:>14} {:>9} {:>6} {:>9} {:>8} {:>9}".format(*row) for row in rows]
    lines += ["", *_conclusions(result)]
    if levers := result.get("stack"):
        table = [list(LEVER_COLUMNS), *map(_lever_cells, levers)]
        lines += ["", *("{:<16} {:>3} {:>10} {:>14} {:>5} {:>8} {:>10} {:>8} {:>8}".format(*row) for row in table)]
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
        " time that prompts take. Drafter: the share of a step beyond a plain step over as many rows, these being as"
        " many sequences; too low where their attention costs more than that of one sequence's rows.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {' | '.join(_cells(point))} |" for point in result["points"]]
    lines += ["", *(f"- {line}" for line in _conclusions(result)), "", "![the sweep](sweep.png)", ""]
    if levers := result.get("stack"):
        lines += ["## Levers", "", f"| {' | '.join(LEVER_COLUMNS)} |", "|" + "---|" * len(LEVER_COLUMNS)]
        lines += [f"| {' | '.join(_lever_cells(lever))} |" for lever in levers]
        lines += ["", "Own: against the lever's own plain decoding. Plain: prompts whose answers differ from the plain"]
        lines += ["target's, and the change of the loss on the prompts themselves (nats per token).", ""]
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
        "–" if point["draft_share"] is None else f"{point['draft_share']:.0%}",
        f"{parity['mismatches']} of {parity['prompts']}",
    ]


def _lever_cells(lever: dict[str, Any]) -> list[str]:
    if lever["failed"]:
        return [lever["lever"], str(lever["gamma"]), "failed", *["–"] * (len(LEVER_COLUMNS) - 3)]
    low, high = lever["ci95"]
    plain, speculating = (lever["memory"][arm] for arm in ("baseline", "candidate"))
    return [
        lever["lever"],
        str(lever["gamma"]),
        f"{lever['speedup']:.2f}×",
        f"{low:.2f}–{high:.2f}",
        f"{lever['tau']:.2f}",
        f"{lever['parity']['mismatches']} of {lever['parity']['prompts']}",
        f"{lever['differ_from_plain_target']} of {lever['parity']['prompts']}",
        f"{lever['loss_change']:+.4f}",
        f"{_gib(plain)} / {_gib(speculating)}",
    ]


def _gib(memory: dict[str, Any]) -> str:
    return f"{(memory['gpu_bytes'] or memory['pss_bytes']) / 2**30:.2f}"


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
    lines += [
        f"lever {lever['lever']} failed: {lever['failed']}" for lever in result.get("stack", []) if lever["failed"]
    ]
    if (mixed := result.get("mixed")) is not None:
        single = f"γ {mixed['single']}" if mixed["single"] else "plain decoding"
        if mixed["skipped"]:
            lines.append(f"mixed load: not measured against {single}, the best single choice: {mixed['skipped']}")
        else:
            ratio = "{:.2f} times as fast ({:.2f}–{:.2f})".format(mixed["speedup"], *mixed["ci95"])
            lines.append(f"mixed load: the schedule is {ratio} as {single} throughout, the best single choice")
    return lines
