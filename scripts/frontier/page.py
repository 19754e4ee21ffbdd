"""The frontier's page: a table per format, who is best, how far scores agree, and what was measured on what."""

from __future__ import annotations

from laguna_serve.scripts.frontier.estimates import Contest, Interval
from laguna_serve.scripts.frontier.published import UNPRUNED
from laguna_serve.scripts.frontier.result import FrontierFormat, FrontierResult
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table


def format_page(result: FrontierResult) -> str:
    """Format everything in Markdown."""
    parts = ["# Held-out loss against bytes, by score", *(_format_losses(result, one) for one in result.formats)]
    parts += [
        "## Which mask costs least",
        "\n".join(f"- {describe_contest(contest)}" for contest in result.contests),
        "\n".join(_list_pairs(result)),
        "## How far the scores agree",
        _format_correlations(result),
        "## Beside XS.2",
        _format_published(result),
        _describe(result),
        cite_environment(result.environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_summary(result: FrontierResult) -> str:
    """Format what a terminal shows at the end: the tables and the verdicts."""
    parts = [_format_losses(result, one) for one in result.formats]
    lines = [describe_contest(contest) for contest in result.contests] + _list_pairs(result)
    return "\n\n".join([*parts, "\n".join(lines), _format_correlations(result)])


def describe_contest(contest: Contest) -> str:
    """Say who wins and by how much, or that it cannot be said."""
    where = f"{contest.format}, {contest.ratio:.0%}: "
    behind = [f"`{rival.mask}` {show(rival)}" for rival in contest.rivals if rival.is_clear]
    others = f"; behind it: {', '.join(behind)}" if behind else ""
    if not contest.rivals:
        return f"{where}`{contest.best}`, without a rival"
    if contest.equals:
        equals = ", ".join(f"`{name}`" for name in contest.equals)
        least = f"`{contest.best}` adds least, and {equals} cannot be distinguished from it"
        return f"{where}no winner: {least}{others}"
    return f"{where}`{contest.best}` wins by {show(contest.rivals[0])} over `{contest.rivals[0].mask}`{others}"


def show(interval: Interval) -> str:
    """Write a difference with its interval, in nats per token."""
    return f"{interval.delta:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def _format_losses(result: FrontierResult, stored: FrontierFormat) -> str:
    points = [point for point in result.points if point.format == stored.format]
    ratios = sorted({point.ratio for point in points})
    heads = ["mask", *(head for ratio in ratios for head in (f"{ratio:.0%}: added nats", "bytes"))]
    rows = []
    for mask in dict.fromkeys(point.mask for point in points):
        of_mask = {point.ratio: point for point in points if point.mask == mask}
        rows.append([mask, *(cell for ratio in ratios for cell in (show(of_mask[ratio]), f"{of_mask[ratio].bytes:,}"))])
    title = f"## {stored.format}: {stored.loss:.4f} nats unpruned, {stored.bytes:,} bytes"
    return f"{title}\n\n{Table('l' + 'lr' * len(ratios), heads, rows).to_markdown()}"


def _list_pairs(result: FrontierResult) -> list[str]:
    first, *others = result.formats
    lines = [f"- {one.format} less {first.format}, unpruned: {show(one.rounding)}" for one in others]
    lines += [
        f"- {mask}, single atoms less groups: "
        + ", ".join(f"{share}% {show(interval)}" for share, interval in intervals.items())
        for mask, intervals in result.atoms.items()
    ]
    if result.repacking:
        shown = ", ".join(f"{one.ratio:.0%} {show(one)}" for one in result.repacking)
        lines.append(f"- repacked routing less the parent's, the same blocks of `heapr`: {shown}")
    return lines


def _format_correlations(result: FrontierResult) -> str:
    names = list(result.correlations)
    rows = [
        [one, *(f"{result.correlations[one][other]:.3f}" for other in names), f"{result.repeatability[one]:.3f}"]
        for one in names
    ]
    table = Table("l" + "r" * (len(names) + 1), ["Spearman", *names, "itself, another draw"], rows)
    return table.to_markdown()


def _format_published(result: FrontierResult) -> str:
    ours = {
        "heapr": "here, HEAPr groups",
        "random": "here, random groups",
        "heapr-repacked": "here, repacked",
    }
    shares = sorted({share for curve in result.published for share in curve.shares})
    rows = [
        [curve.name, *(_show_share(dict(zip(curve.shares, curve.perplexities, strict=True)).get(s)) for s in shares)]
        for curve in result.published
    ]
    first = result.formats[0].format
    for mask, name in ours.items():
        found = {p.ratio: p.perplexity for p in result.points if (p.mask, p.format) == (mask, first)}
        rows.append([name, *(_show_share(found.get(share)) for share in shares)])
    heads = ["perplexity over the unpruned model's", *(f"{share:.0%}" for share in shares)]
    source = (
        f"XS.2's as published (perplexity {UNPRUNED} unpruned); another model on another text, for the shape alone."
    )
    return f"{Table('l' + 'r' * len(shares), heads, rows).to_markdown()}\n\n{source}"


def _show_share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio - 1:+.2%}"


def _describe(result: FrontierResult) -> str:
    text, drawn = result.text, result.calibration
    draws = "draws" if drawn.draws > 1 else "draw"
    return (
        f"{text.targets:,} tokens of {text.source} in {text.rows:,} rows; masks applied in memory. Scores of"
        f" {drawn.draws} {draws} of {drawn.rows:,} of the {drawn.available:,} rows of {drawn.source}"
        f" ({min(drawn.tokens):,} tokens and more each), and as many random masks. Intervals are of 95%, over rows and"
        " draws; in the comparisons they are paired by both and wide enough for all rivals together. Groups have"
        f" {result.block_size} atoms. Every expert keeps a group (of `-atoms`: an atom), also by `reap`, and the router"
        " is left alone. `reap-experts` takes whole experts from the router, as REAP does, `mone` puts a constant in"
        " their place, as MoNE does; both rank over all layers. fp8: experts rounded with a scale for each atom's 128"
        " columns, and loss of the dequantised values."
    )
