"""A comparison of sampled completions for people: as text and as Markdown."""

from __future__ import annotations

from laguna_serve.bench.sampled.result import ArmComparison, SamplingResult
from laguna_serve.bench.sampled.verdict import SHARES, TRIALS, WANTED_POWER
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table


def render_text(result: SamplingResult) -> str:
    """Render the result as a table in columns, and what the test would have seen."""
    return f"{_tabulate(result).to_text()}\n\n{_describe_power(result)}"


def render_markdown(result: SamplingResult) -> str:
    """Render the same as a page."""
    work, sampling = result.workload, result.draft_sampling or "greedy"
    scope = f"{work.prompts} prompts × {work.completions} completions of {work.tokens} tokens at temperature"
    power = [[f"{float(share):.0%}", f"{value:.0%}"] for share, value in result.power.items()]
    lines = [
        "# Does speculation preserve the distribution?",
        "",
        f"{result.model}, drafter {result.draft} ({sampling}); {scope} {work.temperature}."
        " p-values of permutation tests; the least of one prompt is corrected for the number of prompts.",
        "",
        _tabulate(result).to_markdown(),
        "",
        _describe_power(result),
        "",
        Table("rr", ["share turned into the likeliest", "detected"], power).to_markdown(),
        "",
        cite_environment(result.environment),
    ]
    return "\n".join(lines) + "\n"


def _tabulate(result: SamplingResult) -> Table:
    heads = ["against the baseline", "p, all prompts together", "p, least of one prompt", "verdict"]
    rows = [
        [row.arm, _show(row.pooled_p), _show(row.least_adjusted_p), _show_verdict(row)] for row in result.comparisons
    ]
    return Table("lrrl", heads, rows)


def _show(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def _show_verdict(row: ArmComparison) -> str:
    return f"another distribution (p {row.p:.2g})" if row.differs else "no difference detected"


def _describe_power(result: SamplingResult) -> str:
    share = result.detectable_share
    if share is None:
        return f"Power: below {WANTED_POWER:.0%} even for {SHARES[-1]:.0%} of completions; ask for more of them."
    return (
        f"Power: a bug that turns {share:.0%} of the completions into the likeliest one would be found in "
        f"{result.power[str(share)]:.0%} of such runs ({TRIALS} simulated; level {result.level:g} over all γ)."
    )
