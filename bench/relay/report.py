"""What bench/gateway.py measured, for people: as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def render_text(result: Mapping[str, Any]) -> str:
    """In columns."""
    header = ["streams", "path", "TTFT p50", "added TTFT, ms", "added per event, µs", "per gap, µs"]
    header += ["own µs", "CPU µs", "events/s", "failed"]
    layout = "{:>11}  {:<12} {:>8} {:>20} {:>20} {:>16} {:>6} {:>6} {:>8} {:>6}"
    return "\n".join(layout.format(*row) for row in (header, *_list_rows(result)))


def render_markdown(result: Mapping[str, Any]) -> str:
    """As a page."""
    environment = result["environment"]
    columns = ["streams", "path", "TTFT p50, ms", "added TTFT, ms", "added per event, µs", "per gap, µs"]
    columns += ["own, µs", "CPU, µs", "events/s", "failed", "MiB"]
    lines = [
        "# What the gateway adds",
        "",
        f"Streams of {result['chunks']} events, {result['gap_ms']} ms apart; client, mock engine and relays on"
        f" {environment['cores']} cores of {environment['cpu']}, interleaved. Medians over rounds, quartiles in"
        " brackets, against the direct path in the same round. Splice: two sockets joined, unread. Streams begin one"
        " after the other, as those of many clients do, or all in one moment (at once). Per event: its way from engine"
        " to client. Per gap: the mean time between two events of a stream. Own: from reading an event's bytes to"
        " writing them, as our gateway's metrics say (a mean). CPU: of the relay, per event.",
        "",
        f"| {' | '.join(columns)} |",
        "|--" * len(columns) + "|",
    ]
    memory = [path.get("rss_mib") for load in result["loads"] for path in load["paths"].values()]
    for row, mib in zip(_list_rows(result), memory, strict=True):
        lines.append(f"| {' | '.join(row)} | {'' if mib is None else f'{mib:.0f}'} |")
    return "\n".join([*lines, "", f"`{environment['command']}`, {environment['date']}."]) + "\n"


def _list_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for load in result["loads"]:
        for name, path in load["paths"].items():
            ttft = path["added_ttft_ms"]
            yield (
                f"{load['streams']}{' at once' * load['at_once']}",
                name,
                f"{path['ttft_ms_p50']:.2f}",
                f"{ttft['median']:.2f} ({ttft['q25']:.2f}–{ttft['q75']:.2f})",
                *(_spread(path[key]) for key in ("added_chunk_us", "added_gap_us")),
                *(f"{path[key]:.0f}" if key in path else "" for key in ("own_us_per_event", "cpu_us_per_event")),
                f"{path['chunks_per_s']:,.0f}",
                str(path["errors"]),
            )


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.0f} ({found['q25']:.0f}–{found['q75']:.0f})"
