"""What rollouts cost, for people: as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from laguna_serve.bench.arms.arms import ARMS
from laguna_serve.bench.rollout.break_even import PRICE, START
from laguna_serve.bench.rollout.result import LOSES, PAYS, Estimate, RolloutPoint, RolloutsResult
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

DEVICE_SECONDS = {
    "cpu": "A core-second is a second of a core's time used by the engine's processes, waiting loops included",
    "url": "Device-seconds of endpoints are not known",
    "gpu": "A device-second is a second of wall time, as the engine has one GPU to itself in its turn",
}
UNIT = {"cpu": "core-s", "gpu": "device-s", "url": "device-s"}
IN_TURN = "one engine at a time, plain decoding first and last, with intervals that allow for its drift"


def render_text(result: RolloutsResult) -> str:
    """Tables in columns, then the verdicts and what they do not show."""
    parts = [f"{title}\n{table.to_text('  ')}" for title, table in list_tables(result)]
    parts.append("\n".join(conclude(result)))
    parts.append("\n".join(["what this does not show:", *(f"  {limit}" for limit in list_limits(result))]))
    return "\n\n".join(parts)


def render_markdown(result: RolloutsResult) -> str:
    """Render the same as a page."""
    work, sampling = result.workload, result.draft_sampling or "greedy"
    lines = [
        "# What a rollout costs",
        "",
        f"{result.model}, drafter {result.draft} ({sampling}), {result.how_many}; groups of {work.group} completions of"
        f" one prompt ({work.prompts}), {work.max_tokens} tokens each at temperature {work.temperature:g},"
        f" with the log-probability of every token. {work.rounds} rounds per point and arm,"
        f" {IN_TURN if work.sequential else 'interleaved; both engines up'}, the baseline without the drafter and"
        " otherwise the same.",
        "",
        f"A batch is the number of sequences in flight. {DEVICE_SECONDS[result.device]}. Ratios are speculative ÷"
        " plain, paired over rounds, with bootstrap intervals. Break-even: the τ at which speculation stops paying at"
        " that batch, τ ÷ ratio, the cost of a speculative step in plain steps.",
    ]
    for title, table in list_tables(result):
        lines += ["", f"## {title.capitalize()}", "", table.to_markdown()]
    lines += ["", "![ratios, τ and break-even](rollouts.png)", "", "## Verdicts", ""]
    lines += [f"- {line}" for line in conclude(result)]
    lines += ["", "## What this does not show", "", *(f"- {line}" for line in list_limits(result)), ""]
    return "\n".join([*lines, cite_environment(result.environment)]) + "\n"


def list_tables(result: RolloutsResult) -> list[tuple[str, Table]]:
    """(title, table) of all that was measured."""
    points, versions = result.points, result.versions
    tables = [("cost by batch", _tabulate(_head_costs(result), [_show_costs(point) for point in points]))]
    if versions:
        heads = ["policy version", "τ", "95% interval", "break-even τ", "95% interval", "ratio", "95% interval"]
        title = f"acceptance by policy version, batch {versions[0].batch}; {START}: the model itself"
        tables.append((title, _tabulate([*heads, "speculation"], [_show_version(point) for point in versions])))
    labelled = [(f"batch {point.batch}", point) for point in points]
    labelled += [(f"version {point.version}", point) for point in versions[1:]]
    accepted = [(name, point.acceptance.per_position) for name, point in labelled if point.acceptance is not None]
    if accepted:
        heads = ["drafts accepted up to position", *map(str, range(1, max(len(each) for _, each in accepted) + 1))]
        shares = [[name, *(f"{share:.0%}" for share in each)] for name, each in accepted]
        tables.append(("acceptance per position", _tabulate(heads, shares)))
    return tables


def _tabulate(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table("l" + "r" * (len(heads) - 1), heads, rows)


def _head_costs(result: RolloutsResult) -> list[str]:
    unit = UNIT[result.device]
    heads = ["batch", "tok/s plain", "speculative", "ratio", "95% interval"]
    heads += [f"tok/{unit} plain", "speculative", "ratio", "95% interval", "τ", "break-even τ", "speculation"]
    return heads + (["price per M plain", "speculative"] if result.price_per_hour is not None else [])


def _show_costs(point: RolloutPoint) -> list[str]:
    cells = [str(point.batch), *_show_rates(point.tok_per_s), *_show_ratio(point.ratio)]
    cells += [*_show_rates(point.tok_per_device_s), *_show_ratio(point.device_ratio)]
    tau, even = point.acceptance, point.break_even
    cells += ["–" if tau is None else f"{tau.length:.2f}", "–" if even is None else f"{even.point:.2f}", point.verdict]
    prices = point.price_per_million
    return cells if prices is None else [*cells, *(f"{prices[arm]:.4g}" for arm in ARMS)]


def _show_version(point: RolloutPoint) -> list[str]:
    tau, even = point.acceptance, point.break_even
    cells = [point.version or START, *(["–", "–"] if tau is None else [f"{tau.length:.2f}", _show_range(tau.ci95)])]
    cells += ["–", "–"] if even is None else [f"{even.point:.2f}", _show_range(even.ci95)]
    return [*cells, *_show_ratio(point.ratio), point.verdict]


def _show_rates(rates: Mapping[str, float] | None) -> list[str]:
    return ["–", "–"] if rates is None else [f"{rates[arm]:.0f}" for arm in ARMS]


def _show_ratio(ratio: Estimate | None) -> list[str]:
    return ["–", "–"] if ratio is None else [f"{ratio.point:.2f}×", _show_range(ratio.ci95)]


def _show_range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2f}–{ends[1]:.2f}"


def conclude(result: RolloutsResult) -> list[str]:
    """Conclude with a verdict per batch and per later version, and the price."""
    points, later = result.points, result.versions[1:]
    lines = [f"batch {point.batch}: {_judge(point)}" for point in points]
    lines += [f"version {point.version}, batch {point.batch}: {_judge(point)}" for point in later]
    drifts = [(point.batch, point.version, point.drift) for point in [*points, *later] if point.drift]
    lines += [
        f"batch {batch}{'' if version is None else f', version {version}'}: {drift.describe()}"
        for batch, version, drift in drifts
    ]
    if (preempted := sum(sum(point.preemptions.values()) for point in [*points, *later])) > 0:
        lines.append(
            f"{preempted} sequences were preempted and computed again: the KV cache is too small for the batch"
        )
    if result.workload.prefix_caching:
        plain, speculating = (f"{points[-1].cached_share[arm]:.0%}" for arm in ARMS)
        lines.append(
            f"prompt tokens shared in groups of batch {points[-1].batch}: plain {plain}, speculative {speculating}"
        )
    per_hour = result.price_per_hour
    return [
        *lines,
        PRICE + ("; --price-per-hour fills it in" if per_hour is None else f"; here at {per_hour:g} an hour"),
    ]


def _judge(point: RolloutPoint) -> str:
    if point.acceptance is None or point.break_even is None:
        ratio, interval = _show_ratio(point.ratio)
        return f"speculation with an adaptive γ {point.verdict}: {ratio} ({interval})"
    tau, even = f"{point.acceptance.length:.2f}", point.break_even
    limit = f"{even.point:.2f} ({_show_range(even.ci95)})"
    if point.verdict == PAYS:
        return f"speculation pays, as long as τ stays above about {limit}; it is {tau}"
    if point.verdict == LOSES:
        return f"speculation does not pay: τ {tau} is below the break-even of {limit}"
    return f"inconclusive: τ {tau} is within the interval of the break-even, {limit}; more --rounds narrow it"


def list_limits(result: RolloutsResult) -> list[str]:
    """List what these figures do not say."""
    device = {
        "cpu": "what other machines need: engine and client share this machine's cores",
        "url": "what the endpoints' devices cost: nothing is known of them here",
        "gpu": "what the host's processors cost: device-seconds are the GPU's alone",
    }[result.device]
    return [
        "whether both arms draw from one distribution: what they draw differs, so tokens are equal in number and not"
        " in content (bench/sampling.py tests it)",
        "what answers that end by themselves take: end-of-sequence is ignored so that both arms do equal work",
        "what a trainer gains that keeps the engine full: a round waits for its last sequence",
        device,
        "how another day or other prompts would turn out: the intervals are over this run's rounds",
    ]
