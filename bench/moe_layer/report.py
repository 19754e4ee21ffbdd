"""A kernel benchmark for people: one table."""

from __future__ import annotations

from laguna_serve.bench.moe_layer.result import MoeResult, MoeRow
from laguna_serve.serving.kit.tables import INTERRUPTED_RUN, Table

HEADS = (
    "routing",
    "weights",
    "tokens",
    "pruned",
    "experts",
    "µs",
    "p10–p90",
    "GB/s",
    "of floor",
    "vLLM µs",
    "÷ vLLM (95%)",
)


def render_text(result: MoeResult) -> str:
    """Render what was timed where, and a row for each setting."""
    settings, bandwidth = result.settings, result.bandwidth_gb_s
    read = f", read {bandwidth['read']:.1f}" if "read" in bandwidth else ""
    path = f" ({settings.path})" if settings.path else ""
    threads = f"{settings.threads} threads" if settings.threads > 1 else "1 thread"
    clock = ", its processor time" if settings.clock == "processor" else ""
    lines = [
        f"MoE layer: {settings.experts} experts × {settings.intermediate}, hidden {settings.hidden},"
        f" top-{settings.topk}, blocks of {settings.block}, {settings.dtype}",
        f"device {settings.device}{path}, {threads}{clock}; GB/s: copy {bandwidth['copy']:.1f}{read}",
        f"vLLM: {result.stock}",
        "",
        Table("ll" + "r" * 8 + "l", HEADS, [_list_cells(row) for row in result.rows]).to_text(),
    ]
    lines += [f"refused: {reason}" for reason in result.refused]
    return "\n".join([*lines, *([INTERRUPTED_RUN] if result.partial else [])])


def render_markdown(result: MoeResult) -> str:
    """Render the same as a page."""
    return f"```text\n{render_text(result)}\n```\n"


def summarise(row: MoeRow) -> str:
    """Summarise a row in a few words."""
    if row.refused:
        return f"REFUSED: {row.refused}"
    versus = f", {row.ratio:.2f} × vLLM's" if row.ratio else ""
    return f"{row.us:.1f} µs, {row.gb_s:.1f} GB/s{versus}"


def _list_cells(row: MoeRow) -> list[str]:
    cells = [row.routing, row.kind, str(row.tokens), f"{row.pruning:.0%}"]
    if row.refused or not row.us_p10_p90:
        return [*cells, "", "refused", *[""] * (len(HEADS) - 6)]
    low, high = row.us_p10_p90
    cells += [f"{row.distinct_experts:.1f}", f"{row.us:.1f}", f"{low:.0f}–{high:.0f}", f"{row.gb_s:.1f}"]
    cells.append(f"{row.percent_of_floor:.0f}%")
    if not row.ratio or not row.ratio_ci95:
        return [*cells, "", ""]
    low, high = row.ratio_ci95
    return [*cells, f"{row.stock_us:.1f}", f"{row.ratio:.3f} ({low:.3f}–{high:.3f})"]
