"""The result as a table for people: plain text for the terminal (at most 100 columns), Markdown for the file."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from laguna_serve.bench.harness.schedule import ARMS

WIDTH = 100
GIB = 2**30
REFUSED = "refused"
SHOWN_DIVERGENCES = 10

Arm = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the arms' table."""

    name: str
    baseline: str
    candidate: str


def render_text(result: dict[str, Any]) -> str:
    """The whole report as plain text."""
    lines = [_title(result)]
    for name, sentence in _describe_setting(result):
        lines += _wrap_named(name, sentence)
    lines.append("")
    lines += [f"{'':<38}{'baseline':>18}{'candidate':>18}"]
    lines += [f"{row.name:<38}{row.baseline:>18}{row.candidate:>18}" for row in _list_rows(result)]
    lines.append("")
    for name, sentence in _list_findings(result):
        lines += _wrap_named(name, sentence)
    lines += _wrap_items("divergences", _list_divergences(result))
    lines += _wrap_items("withheld figures", _list_refusals(result))
    return "\n".join(lines) + "\n"


def render_markdown(result: dict[str, Any]) -> str:
    """The same report as Markdown, with the commands that started the engines."""
    lines = [
        f"# {_title(result)}",
        "",
        *(f"- **{name}**: {sentence}" for name, sentence in _describe_setting(result)),
        "",
    ]
    lines += ["| | baseline | candidate |", "|---|---:|---:|"]
    lines += [f"| {row.name} | {row.baseline} | {row.candidate} |" for row in _list_rows(result)]
    lines += ["", *(f"- **{name}**: {sentence}" for name, sentence in _list_findings(result))]
    for title, items in (("Divergences", _list_divergences(result)), ("Withheld figures", _list_refusals(result))):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    lines += ["", "![speedup per prompt and acceptance per position](ab.png)", "", "## Where and how", ""]
    lines += [f"- {key}: {value}" for key, value in result["environment"].items() if value is not None]
    for name in ARMS:
        if result["arms"][name]["command"]:
            lines.append(f"- {name}: `{shlex.join(result['arms'][name]['command'])}`")
    return "\n".join(lines) + "\n"


def _title(result: dict[str, Any]) -> str:
    work = result["workload"]
    partial = " · PARTIAL: the run ended early" if result["partial"] else ""
    return f"A/B: {work['prompts']} prompts × {work['max_tokens']} tokens, concurrency {work['concurrency']}{partial}"


def _describe_setting(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    work = result["workload"]
    for name in ARMS:
        yield name, result["arms"][name]["label"]
    order = "both engines up, taking turns" if work["interleaved"] else "one engine after the other"
    yield "setting", f"{order}; greedy, end of text ignored; prompts from {work['prompts_file']}"


def _list_rows(result: dict[str, Any]) -> Iterator[Row]:
    def row(name: str, show: Callable[[Arm], str]) -> Row:
        return Row(name, *(show(result["arms"][arm]) for arm in ARMS))

    yield row("requests (failed)", lambda arm: f"{arm['requests']} ({arm['failed']})")
    yield row("output tokens", lambda arm: f"{arm['output_tokens']:,}")
    yield row("output tok/s", lambda arm: REFUSED if arm["tok_per_s"] is None else f"{arm['tok_per_s']:,.1f}")
    for name, key in (
        ("time to first token", "ttft_ms"),
        ("gap per token", "itl_ms"),
        ("gap per chunk", "chunk_gap_ms"),
        ("whole request", "e2e_ms"),
    ):
        yield row(f"{name}, ms  p50 / p99", lambda arm, key=key: _show_spread(arm[key]))  # type: ignore[misc]
    yield row("tokens per chunk, mean", lambda arm: _show_mean(arm["tokens_per_chunk"]))
    if any(result["arms"][arm]["memory"] for arm in ARMS):
        yield row("engine memory, GiB (PSS)", lambda arm: _show_memory(arm["memory"], "pss_bytes"))
        if any((result["arms"][arm]["memory"] or {}).get("gpu_bytes") for arm in ARMS):
            yield row("engine memory, GiB (GPU)", lambda arm: _show_memory(arm["memory"], "gpu_bytes"))


def _show_spread(summary: dict[str, float] | None) -> str:
    return REFUSED if summary is None else f"{summary['p50']:.2f} / {summary['p99']:.2f}"


def _show_mean(summary: dict[str, float] | None) -> str:
    return REFUSED if summary is None else f"{summary['mean']:.2f}"


def _show_memory(memory: dict[str, Any] | None, key: str) -> str:
    return "not known" if memory is None or memory.get(key) is None else f"{memory[key] / GIB:.2f}"


def _list_findings(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "speedup", _tell_speedup(result)
    yield "parity", _tell_parity(result["parity"])
    control = result["parity"]["control"]
    if control is not None:
        yield (
            "control",
            (f"the baseline against itself: {control['mismatches']} of {control['prompts']} prompts differ"),
        )
    yield "acceptance", _tell_acceptance(result)
    if positions := result["acceptance"]["per_position"]:
        yield "by position", "  ".join(f"{share:.0%}" for share in positions)


def _tell_speedup(result: dict[str, Any]) -> str:
    speedup = result["speedup"]
    if speedup["point"] is None:
        return f"{REFUSED} (see below)"
    low_high = speedup["ci95"]
    interval = f"95% interval {low_high[0]:.2f}–{low_high[1]:.2f}" if low_high else f"95% interval {REFUSED}"
    unit = "prompts" if result["workload"]["concurrency"] == 1 else "rounds"
    return f"{speedup['point']:.2f}× the baseline's tok/s ({interval}, paired over {speedup['pairs']} {unit})"


def _tell_parity(parity: dict[str, Any]) -> str:
    prompts, mismatches = parity["prompts"], parity["mismatches"]
    if mismatches is None:
        return f"{REFUSED} (see below)"
    if prompts == 0:
        return "no prompt was answered by both arms"
    bound = parity["bound95"]
    reach = f"at 95% confidence at most {bound:.1%} of such prompts differ" if bound is not None else f"bound {REFUSED}"
    if mismatches == 0:
        return f"tokens and bytes identical on {prompts} of {prompts} prompts; {reach}"
    classes = ", ".join(
        f"{count} {name.replace('_', ' ')}{'s' * (count > 1)}" for name, count in parity["classes"].items() if count
    )
    return f"{mismatches} of {prompts} prompts differ ({classes}); {reach}"


def _tell_acceptance(result: dict[str, Any]) -> str:
    acceptance = result["acceptance"]
    if acceptance["length"] is not None:
        return (
            f"{acceptance['length']:.2f} tokens per step (at most {len(acceptance['per_position']) + 1}); "
            f"{acceptance['rate']:.1%} of the drafted tokens accepted"
        )
    if any(item["figure"] == "acceptance" for item in result["refused"]):
        return f"{REFUSED} (see below)"
    return "the candidate drafted nothing"


def _list_divergences(result: dict[str, Any]) -> list[str]:
    found = result["parity"]["divergences"]
    more = [f"… and {len(found) - SHOWN_DIVERGENCES} more, in ab.json"] if len(found) > SHOWN_DIVERGENCES else []
    return [_tell_divergence(item) for item in found[:SHOWN_DIVERGENCES]] + more


def _tell_divergence(item: dict[str, Any]) -> str:
    where = "equal tokens" if item["index"] is None else f"after {item['index']} equal tokens"
    text = f"prompt {item['prompt_id']}, {where}: {item['classification'].replace('_', ' ')}; {item['reason']}"
    for name in ARMS:
        if (top2 := item[f"{name}_top2"]) is not None:
            pairs = ", ".join(f"{token} at {logprob:.4f}" for token, logprob in top2)
            again = "" if item[f"{name}_reproduced"] else " (its re-request gave another token)"
            text += f"; {name} chose {item[f'{name}_token']} (log-probabilities: {pairs}){again}"
    return text


def _list_refusals(result: dict[str, Any]) -> list[str]:
    """One item per reason, with the figures that it withholds."""
    by_reason: dict[str, list[str]] = {}
    for item in result["refused"]:
        by_reason.setdefault(item["reason"], []).append(item["figure"])
    return [f"{', '.join(figures)}: {reason}" for reason, figures in by_reason.items()]


def _wrap_named(name: str, sentence: str) -> list[str]:
    return textwrap.wrap(sentence, WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12)


def _wrap_items(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    lines = ["", title]
    for item in items:
        lines += textwrap.wrap(item, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines
