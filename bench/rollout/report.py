"""What rollouts cost, for people: as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.bench.rollout.break_even import LOSES, PAYS, PRICE, START

Rows = list[list[str]]
DEVICE_SECONDS = {
    "cpu": "A core-second is a second of a core's time used by the engine's processes, waiting loops included",
    "gpu": "A device-second is a second of wall time, as the engine has one GPU to itself in its turn",
}
UNIT = {"cpu": "core-s", "gpu": "device-s"}


def render_text(result: Mapping[str, Any]) -> str:
    """Tables in columns, then the verdicts and what cannot be told."""
    parts = []
    for title, rows in list_tables(result):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        aligned = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        parts.append("\n".join([title, *(f"  {line.rstrip()}" for line in aligned)]))
    parts += [
        "\n".join(conclude(result)),
        "\n".join(["cannot be told from this:", *(f"  {t}" for t in list_limits(result))]),
    ]
    return "\n\n".join(parts)


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same as a page."""
    work, environment = result["workload"], result["environment"]
    lines = [
        "# What a rollout costs",
        "",
        f"{result['model']}, drafter {result['draft']} ({result['draft_sampling']}), γ {result['gamma']};"
        f" groups of {work['group']} completions of"
        f" one prompt ({work['prompts']}), {work['max_tokens']} tokens each at temperature {work['temperature']:g},"
        f" with the log-probability of every token. {work['rounds']} rounds per point and arm, taking turns; both"
        " engines up, the baseline without the drafter and otherwise the same.",
        "",
        "A batch is the number of sequences in flight."
        f" {DEVICE_SECONDS[result['device']]}. Ratios are speculative ÷ plain, paired over rounds, with bootstrap"
        " intervals. Break-even: the τ at which speculation stops paying at that batch, τ ÷ ratio, the cost of a"
        " speculative step in plain steps.",
    ]
    for title, rows in list_tables(result):
        lines += ["", f"## {title.capitalize()}", "", f"| {' | '.join(rows[0])} |", "|" + "--|" * len(rows[0])]
        lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    lines += ["", "![ratios, τ and break-even](rollouts.png)", "", "## Verdicts", ""]
    lines += [f"- {line}" for line in conclude(result)]
    lines += ["", "## What cannot be told from this", "", *(f"- {line}" for line in list_limits(result)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    where = f"{environment['cpu']}, {environment['cores']} cores"
    if environment["device"] is not None and environment["device"]["kind"] == "gpu":
        where = f"{environment['device']['name']}, {where}"
    return "\n".join([*lines, f"`{environment['command']}` on {where}, {environment['date']}; {versions}."]) + "\n"


def list_tables(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """(title, rows with the heads first) of every table."""
    points, versions = result["points"], result["versions"]
    tables = [("cost by batch", [_head_costs(result), *(_show_costs(result, point) for point in points)])]
    if versions:
        head = ["policy version", "τ", "95% interval", "break-even τ", "95% interval", "ratio", "95% interval"]
        rows = [_show_version(point) for point in versions]
        title = f"acceptance by policy version, batch {versions[0]['batch']}; {START}: the model itself"
        tables.append((title, [[*head, "speculation"], *rows]))
    width = max(len(point["acceptance"]["per_position"]) for point in [*points, *versions])
    head = ["drafts accepted up to position", *map(str, range(1, width + 1))]
    labelled = [(f"batch {point['batch']}", point) for point in points]
    labelled += [(f"version {point['version']}", point) for point in versions[1:]]
    shares = [[name, *(f"{share:.0%}" for share in point["acceptance"]["per_position"])] for name, point in labelled]
    return [*tables, ("acceptance per position", [head, *shares])]


def _head_costs(result: Mapping[str, Any]) -> list[str]:
    unit = UNIT[result["device"]]
    head = ["batch", "tok/s plain", "speculative", "ratio", "95% interval"]
    head += [f"tok/{unit} plain", "speculative", "ratio", "95% interval", "τ", "break-even τ", "speculation"]
    return head + (["price per M plain", "speculative"] if result["price_per_hour"] is not None else [])


def _show_costs(result: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    cells = [str(point["batch"]), *_show_rates(point["tok_per_s"]), *_show_ratio(point["ratio"])]
    cells += [*_show_rates(point["tok_per_device_s"]), *_show_ratio(point["device_ratio"])]
    cells += [f"{point['acceptance']['length']:.2f}", f"{point['break_even']['point']:.2f}", point["verdict"]]
    prices = point["price_per_million"]
    return cells if prices is None else [*cells, *(f"{prices[arm]:.4g}" for arm in (BASELINE, CANDIDATE))]


def _show_version(point: Mapping[str, Any]) -> list[str]:
    tau, even = point["acceptance"], point["break_even"]
    cells = [point["version"] or START, f"{tau['length']:.2f}", _show_range(tau["ci95"])]
    cells += [f"{even['point']:.2f}", _show_range(even["ci95"])]
    return [*cells, *_show_ratio(point["ratio"]), point["verdict"]]


def _show_rates(rates: Mapping[str, float] | None) -> list[str]:
    return ["–", "–"] if rates is None else [f"{rates[arm]:.0f}" for arm in (BASELINE, CANDIDATE)]


def _show_ratio(ratio: Mapping[str, Any] | None) -> list[str]:
    return ["–", "–"] if ratio is None else [f"{ratio['point']:.2f}×", _show_range(ratio["ci95"])]


def _show_range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.2f}–{ends[1]:.2f}"


def conclude(result: Mapping[str, Any]) -> list[str]:
    """A verdict per batch and per later version, and the price."""
    lines = [f"batch {point['batch']}: {_judge(point)}" for point in result["points"]]
    lines += [f"version {p['version']}, batch {p['batch']}: {_judge(p)}" for p in result["versions"][1:]]
    if (preempted := sum(sum(p["preemptions"].values()) for p in [*result["points"], *result["versions"][1:]])) > 0:
        lines.append(
            f"{preempted} sequences were preempted and computed again: the KV cache is too small for the batch"
        )
    if result["workload"]["prefix_caching"]:
        largest = result["points"][-1]
        plain, speculating = (f"{largest['cached_share'][arm]:.0%}" for arm in (BASELINE, CANDIDATE))
        lines.append(
            f"prompt tokens shared in groups of batch {largest['batch']}: plain {plain}, speculative {speculating}"
        )
    per_hour = result["price_per_hour"]
    example = "" if per_hour is None else f"; here at {per_hour:g} an hour"
    return [*lines, PRICE + example + ("" if per_hour is not None else "; --price-per-hour fills it in")]


def _judge(point: Mapping[str, Any]) -> str:
    tau, even = f"{point['acceptance']['length']:.2f}", point["break_even"]
    limit = f"{even['point']:.2f} ({_show_range(even['ci95'])})"
    if point["verdict"] == PAYS:
        return f"speculation pays, as long as τ stays above about {limit}; it is {tau}"
    if point["verdict"] == LOSES:
        return f"speculation does not pay: τ {tau} is below the break-even of {limit}"
    return f"cannot be told: τ {tau} is within the interval of the break-even, {limit}; more --rounds narrow it"


def list_limits(result: Mapping[str, Any]) -> list[str]:
    """What these figures do not say."""
    device = {
        "cpu": "what other machines need: engine and client share this machine's cores",
        "gpu": "what the host's processors cost: device-seconds are the GPU's alone",
    }[result["device"]]
    return [
        "whether both arms draw from one distribution: what they draw differs, so tokens are equal in number and not"
        " in content (bench/sampling.py tests it)",
        "what answers that end by themselves take: end-of-sequence is ignored so that both arms do equal work",
        "what a trainer gains that keeps the engine full: a round waits for its last sequence",
        device,
        "how another day or other prompts would turn out: the intervals are over this run's rounds",
    ]
