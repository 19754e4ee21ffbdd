"""A γ sweep for people: as text and as Markdown."""

from __future__ import annotations

from laguna_serve.bench.arms.arms import ARMS
from laguna_serve.bench.gamma.result import AblationResult, PointFigures, SweepPoint, SweepResult
from laguna_serve.bench.harness.prompts import describe_load, describe_rounds
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.memory import GIB, EngineMemory

COLUMNS = ("concurrency", "γ", "speed-up", "95% interval", "predicted", "τ", "step cost", "drafter", "differ")
ABLATION_COLUMNS = (
    "ablation",
    "γ",
    "own",
    "95% interval",
    "τ",
    "own differ",
    "plain differ",
    "loss",
    "GiB plain / with",
)
ADAPTIVE_COLUMNS = (
    *("concurrency", "best fixed", "schedule", "adaptive", "95% interval", "÷ best fixed", "95% interval", "τ"),
    *("step cost", "differ"),
)
BEYOND = "*"


def render_text(result: SweepResult) -> str:
    """Every point in columns, then what was chosen."""
    lines = [_tabulate_points(result).to_text(), "", *_conclude(result)]
    if result.adaptive:
        lines += ["", _tabulate_adaptive(result).to_text()]
    if result.stack:
        lines += ["", _tabulate_ablations(result.stack).to_text()]
    return "\n".join(lines)


def render_markdown(result: SweepResult) -> str:
    """Render the same as a page."""
    work = result.workload
    load = describe_load(work.num_prompts, work.max_tokens, work.own_lengths)
    load += describe_rounds(work.waves, work.num_warmups)
    drawn = (
        f"at temperature {work.temperature:g}, drafts {work.draft_sampling or 'greedy'}"
        if work.temperature
        else "greedy"
    )
    lines = [
        "# γ sweep",
        "",
        f"{result.model}, drafter {result.draft}; {load} of {work.prompts}, {drawn}. Each point is an A/B against plain"
        f" decoding, {_describe_order(result)}; the prediction is τ ÷ step cost from the largest γ's acceptance and a"
        " line through the costs, without the time that prompts take. Drafter: the share of a step beyond a plain step"
        " over as many rows, these being as many sequences; too low where their attention costs more than that of one"
        " sequence's rows.",
        "",
        _tabulate_points(result).to_markdown(),
        "",
        *(f"- {line}" for line in _conclude(result)),
        "",
        "![the sweep](sweep.png)",
        "",
    ]
    if result.adaptive:
        lines += ["## γ decided in every step", "", _tabulate_adaptive(result).to_markdown(), ""]
        lines += ["Speed-ups over plain decoding; ÷ best fixed: over the fixed γ that was fastest at that concurrency,"]
        lines += ["where none was faster over plain decoding. τ is of the steps that drafted.", ""]
    if result.stack:
        lines += ["## Ablations", "", _tabulate_ablations(result.stack).to_markdown(), ""]
        lines += ["Own: against the ablation's own plain decoding. Plain: prompts whose answers differ from the plain"]
        lines += ["target's, and the change of the loss on the prompts themselves (nats per token).", ""]
    return "\n".join([*lines, cite_environment(result.environment)]) + "\n"


def _describe_order(result: SweepResult) -> str:
    if not result.workload.sequential:
        return "both engines up and interleaved"
    return (
        "one engine at a time, plain decoding first and last, with intervals that allow for its drift between the two"
    )


def _show_gamma(gamma: int) -> str:
    """`γ 7`; 0 is plain decoding."""
    return f"γ {gamma}" if gamma else "plain decoding"


def _tabulate_points(result: SweepResult) -> Table:
    return Table("r" * len(COLUMNS), COLUMNS, [_list_cells(point) for point in result.points])


def _list_cells(point: SweepPoint) -> list[str]:
    low, high = point.ci95
    return [
        str(point.concurrency),
        f"{point.gamma}{BEYOND * point.beyond_block}",
        f"{point.speedup:.2f}×",
        f"{low:.2f}–{high:.2f}",
        f"{point.predicted:.2f}×",
        f"{point.tau:.2f}",
        f"{point.step_cost:.2f}",
        "–" if point.draft_share is None else f"{point.draft_share:.0%}",
        _show_differing(point),
    ]


def _tabulate_adaptive(result: SweepResult) -> Table:
    speedups = {(point.concurrency, point.gamma): point.speedup for point in result.points}

    def show(concurrency: int, gamma: int) -> str:
        speedup = speedups.get((concurrency, gamma))
        return _show_gamma(gamma) + ("" if speedup is None else f": {speedup:.2f}×")

    rows = [
        [
            str(point.concurrency),
            show(point.concurrency, point.best),
            show(point.concurrency, point.scheduled),
            f"{point.speedup:.2f}×",
            "{:.2f}–{:.2f}".format(*point.ci95),
            f"{point.against_best:.2f}",
            "{:.2f}–{:.2f}".format(*point.against_best_ci95),
            f"{point.tau:.2f}",
            f"{point.step_cost:.2f}",
            _show_differing(point),
        ]
        for point in result.adaptive or []
    ]
    return Table("r" * len(ADAPTIVE_COLUMNS), ADAPTIVE_COLUMNS, rows)


def _show_differing(point: PointFigures) -> str:
    """`0 of 64`; a dash where answers were drawn, and not compared."""
    return f"{point.parity.mismatches} of {point.parity.prompts}" if point.parity.prompts else "–"


def _tabulate_ablations(ablations: list[AblationResult]) -> Table:
    align = "l" + "r" * (len(ABLATION_COLUMNS) - 1)
    return Table(align, ABLATION_COLUMNS, [_list_ablation_cells(item) for item in ablations])


def _list_ablation_cells(item: AblationResult) -> list[str]:
    if not item.parity or not item.ci95 or not item.memory:
        return [item.ablation, str(item.gamma), "failed", *["–"] * (len(ABLATION_COLUMNS) - 3)]
    low, high = item.ci95
    return [
        item.ablation,
        str(item.gamma),
        f"{item.speedup:.2f}×",
        f"{low:.2f}–{high:.2f}",
        f"{item.tau:.2f}",
        f"{item.parity.mismatches} of {item.parity.prompts}",
        f"{item.differ_from_plain_target} of {item.parity.prompts}",
        f"{item.loss_change:+.4f}",
        " / ".join(_show_gib(item.memory[arm]) for arm in ARMS),
    ]


def _show_gib(memory: EngineMemory | None) -> str:
    return "–" if memory is None else f"{(memory.gpu_bytes or memory.pss_bytes) / GIB:.2f}"


def _conclude(result: SweepResult) -> list[str]:
    lines = [
        f"concurrency {choice.concurrency}: {_show_gamma(choice.gamma)}; {choice.reason}" for choice in result.choices
    ]
    lines += [
        f"concurrency {concurrency}: a step with γ drafted tokens costs {1 + cost.fixed:.2f} "
        f"{'−' if cost.per_token < 0 else '+'} {abs(cost.per_token):.3f}·γ plain steps"
        for concurrency, cost in result.cost.items()
    ]
    if any(point.beyond_block for point in result.points):
        lines.append(f"{BEYOND} beyond the drafter's block, whose last places it was never trained for; never chosen")
    drifting = sorted({point.concurrency for point in result.points if point.drift})
    lines += [_describe_drift(concurrency, result) for concurrency in drifting]
    lines += [f"γ {gamma} failed: {reason}" for gamma, reason in result.failed.items()]
    lines.append(f"schedule: {_show_schedule(result)}")
    lines += [f"ablation {item.ablation}: {item.drift.describe()}" for item in result.stack or [] if item.drift]
    lines += [f"ablation {item.ablation} failed: {item.failed}" for item in result.stack or [] if item.failed]
    if mixed := result.mixed:
        single = _show_gamma(mixed.single)
        if mixed.skipped or not mixed.ci95:
            lines.append(f"mixed load: not measured against {single}, the best single choice: {mixed.skipped}")
        else:
            low, high = mixed.ci95
            ratio = f"{mixed.speedup:.2f} times as fast ({low:.2f}–{high:.2f})"
            lines.append(f"mixed load: the schedule is {ratio} as {single} throughout, the best single choice")
            lines += [f"mixed load: {mixed.drift.describe()}"] if mixed.drift else []
    return lines


def _describe_drift(concurrency: int, result: SweepResult) -> str:
    """Describe the largest drift at a concurrency, where a continued sweep has several."""
    drifts = [point.drift for point in result.points if point.drift and point.concurrency == concurrency]
    return f"concurrency {concurrency}: {max(drifts, key=lambda drift: abs(drift.ratio - 1)).describe()}"


def _show_schedule(result: SweepResult) -> str:
    return ", ".join(
        f"batches of {first if first == last else f'{first}–{last}'}: {_show_gamma(gamma)}"
        for first, last, gamma in result.schedule.num_speculative_tokens_per_batch_size
    )
