"""What bench/gateway.py and bench/soak.py measured, for people: as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from laguna_serve.bench.relay.result import GatewayBenchResult, SoakResult
from laguna_serve.bench.stats.quartiles import Quartiles
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

HEADS = (
    "streams",
    "path",
    "TTFT p50, ms",
    "added TTFT, ms",
    "added per event, µs",
    "per gap, µs",
    "own, µs",
    "CPU, µs",
    "events/s",
    "failed",
    "MiB",
)


def render_text(result: GatewayBenchResult) -> str:
    """Render the result as a table in columns, for a terminal."""
    return _tabulate(result).to_text()


def render_markdown(result: GatewayBenchResult) -> str:
    """Render the result as a page with its table."""
    environment = result.environment
    lines = [
        "# What the gateway adds",
        "",
        f"Streams of {result.chunks} events, {result.gap_ms} ms apart; client, mock engine and relays on"
        f" {environment.cores} cores of {environment.cpu}, interleaved. Medians over rounds, quartiles in"
        " brackets, against the direct path in the same round. Splice: two sockets joined, unread. Streams begin one"
        " after the other, as those of many clients do, or all in one moment (at once). Per event: its way from engine"
        " to client. Per gap: the mean time between two events of a stream. Own: from reading an event's bytes to"
        " writing them, as our gateway's metrics say (a mean). CPU: of the relay, per event.",
        "",
        _tabulate(result).to_markdown(),
        "",
        cite_environment(environment),
    ]
    return "\n".join(lines) + "\n"


def _tabulate(result: GatewayBenchResult) -> Table:
    return Table("rl" + "r" * (len(HEADS) - 2), HEADS, list(_list_rows(result)))


def _list_rows(result: GatewayBenchResult) -> Iterator[tuple[str, ...]]:
    for load in result.loads:
        for name, path in load.paths.items():
            yield (
                f"{load.streams}{' at once' * load.at_once}",
                name,
                f"{path.ttft_ms_p50:.2f}",
                _show_quartiles(path.added_ttft_ms, digits=2),
                _show_quartiles(path.added_chunk_us),
                _show_quartiles(path.added_gap_us),
                _show(path.own_us_per_event),
                _show(path.cpu_us_per_event),
                f"{path.chunks_per_s:,.0f}",
                str(path.errors),
                _show(path.rss_mib),
            )


def _show_quartiles(spread: Quartiles, digits: int = 0) -> str:
    return f"{spread.median:.{digits}f} ({spread.q25:.{digits}f}–{spread.q75:.{digits}f})"


def _show(value: float | UnsetType) -> str:
    return "" if value is UNSET else f"{value:.0f}"


def render_soak(result: SoakResult) -> str:
    """Render a soak for the terminal."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.requests.items())
    rss, files = result.rss_mib, result.open_files
    growth = "" if result.memory_growth is None else f" (last quarter ÷ second: {result.memory_growth:.3f})"
    lines = [
        f"{sum(result.requests.values()):,} requests in {result.wall_s:.0f} s: {kinds}",
        f"{result.updates} updates of the weights, {result.reloads} reloads",
        f"memory {rss.start:.0f} → {rss.end:.0f} MiB{growth}; open files {files.start:.0f} → {files.end:.0f}",
    ]
    return "\n".join([*lines, *(f"WRONG {failure}" for failure in result.failures)])


def render_soak_markdown(result: SoakResult) -> str:
    """Render a soak as a page."""
    verdict = "**Fell short.**" if result.failures else "**Held**: every request ended as it must."
    lines = ["# The gateway's soak", verdict, *render_soak(result).split("\n"), cite_environment(result.environment)]
    return "\n\n".join(lines) + "\n"
