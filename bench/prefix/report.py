"""A prefix-cache result for people: as text and as Markdown."""

from __future__ import annotations

from laguna_serve.bench.prefix.result import PrefixCacheResult
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import INTERRUPTED_RUN, Table


def render_text(result: PrefixCacheResult) -> str:
    """Scenarios, then comparisons with their verdicts, in columns."""
    lines = [_tabulate_scenarios(result).to_text(), "", _tabulate_comparisons(result).to_text()]
    if result.partial:
        lines.append(INTERRUPTED_RUN)
    return "\n".join(lines)


def render_markdown(result: PrefixCacheResult) -> str:
    """Render the same as a page."""
    lines = [
        "# Acceptance under prefix caching",
        "",
        f"{result.model}, drafter {result.draft}; {result.max_tokens} tokens per request, eager unless the"
        " command says otherwise. Ratios of acceptance lengths by vLLM's counters; intervals are bootstrapped over"
        " what was sent together: a prompt, a group of copies, or prompts that lost their blocks to each other. By"
        " chunks: of what the client saw, where a server that lags joins steps. vLLM counts one draft more, of"
        " placeholders, for a request of which the cache has all but the last token: ratios by its counters are lower"
        " by that.",
        "",
        _tabulate_comparisons(result).to_markdown(),
        "",
        _tabulate_scenarios(result).to_markdown(),
        "",
        cite_environment(result.environment),
    ]
    if result.partial:
        lines += ["", "Partial: the run was interrupted."]
    return "\n".join(lines) + "\n"


def _tabulate_scenarios(result: PrefixCacheResult) -> Table:
    heads = ["scenario", "tokens per step", "drafts", "prefix hits", "without a drafter", "preemptions"]
    rows = []
    for row in result.scenarios:
        plain = "–" if row.plain_hit_rate is None else f"{row.plain_hit_rate:.0%}"
        drafts = f"{row.drafts:,}"
        rows.append([row.name, _show(row.acceptance), drafts, f"{row.hit_rate:.0%}", plain, str(row.preemptions)])
    return Table("lrrrrr", heads, rows)


def _tabulate_comparisons(result: PrefixCacheResult) -> Table:
    heads = ["comparison", "ratio", "95% interval", "by chunks", "pairs", "answers that differ", "verdict"]
    requests = {row.name: row.requests for row in result.scenarios}
    rows = []
    for row in result.comparisons:
        low, high = row.ci95
        differing = "sampled" if row.differing is None else f"{row.differing} of {requests[row.scenario]}"
        interval = f"{low:.3f}–{high:.3f}"
        ratios = [f"{row.ratio:.3f}", interval, f"{row.ratio_by_chunks:.3f}"]
        rows.append([row.name, *ratios, str(row.pairs), differing, row.verdict])
    return Table("lrrrrrl", heads, rows)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
