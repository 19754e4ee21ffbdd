"""The result as a table for people: plain text for the terminal (at most 100 columns), Markdown for the file."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator

from msgspec import UNSET

from laguna_serve.bench.arms.arms import ARMS
from laguna_serve.bench.harness.prompts import describe_load, describe_rounds
from laguna_serve.bench.harness.result import AbResult, ArmResult, Parity
from laguna_serve.bench.stats.intervals import Spread
from laguna_serve.bench.stats.parity import Verdict
from laguna_serve.serving.kit.environment import list_environment
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.memory import GIB

WIDTH = 100
REFUSED = "refused"
SHOWN_DIVERGENCES = 10


def render_text(result: AbResult) -> str:
    """Render the whole report as plain text."""
    lines = [_title(result)]
    for name, sentence in _describe_setting(result):
        lines += _wrap_named(name, sentence)
    lines.append("")
    lines.append(_tabulate(result).to_text())
    lines.append("")
    for name, sentence in _list_findings(result):
        lines += _wrap_named(name, sentence)
    lines += _wrap_items("divergences", _list_divergences(result))
    lines += _wrap_items("withheld figures", _list_refusals(result))
    if (certificate := result.certificate) is not UNSET:
        summary = certificate.summary or f"none: {'; '.join(certificate.reasons)}"
        page = " (certificate/certificate.html)" if certificate.verdict else ""
        lines += ["", f"certificate {summary}{page}"]
    return "\n".join(lines) + "\n"


def render_markdown(result: AbResult) -> str:
    """Render the same report as Markdown, with the commands that started the engines."""
    lines = [
        f"# {_title(result)}",
        "",
        *(f"- **{name}**: {sentence}" for name, sentence in _describe_setting(result)),
        "",
    ]
    lines.append(_tabulate(result).to_markdown())
    lines += ["", *(f"- **{name}**: {sentence}" for name, sentence in _list_findings(result))]
    for title, items in (("Divergences", _list_divergences(result)), ("Withheld figures", _list_refusals(result))):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    lines += ["", "![speedup per prompt and acceptance per position](ab.png)", "", "## Where and how", ""]
    lines += list_environment(result.environment)
    for name in ARMS:
        if command := result.arms[name].command:
            lines.append(f"- {name}: `{shlex.join(command)}`")
    return "\n".join(lines) + "\n"


def _title(result: AbResult) -> str:
    work = result.workload
    partial = " · PARTIAL: the run ended early" if result.partial else ""
    load = describe_load(work.prompts, work.max_tokens, work.own_lengths)
    return f"A/B: {load}, concurrency {work.concurrency}{describe_rounds(work.waves, work.num_warmups)}{partial}"


def _describe_setting(result: AbResult) -> Iterator[tuple[str, str]]:
    work = result.workload
    for name in ARMS:
        yield name, result.arms[name].label
    order = "both engines up, interleaved" if work.interleaved else "one engine at a time, the baseline first and last"
    end = "end of text ignored" if work.ignore_eos else "answers stop at their end"
    asked = f", {work.chat_prompts} through the chat template" if work.chat_prompts else ""
    yield "setting", f"{order}; greedy, {end}; prompts from {work.prompts_file}{asked}"


def _tabulate(result: AbResult) -> Table:
    return Table("lrr", ["", *ARMS], list(_list_rows(result)))


def _list_rows(result: AbResult) -> Iterator[list[str]]:
    arms = [result.arms[name] for name in ARMS]

    def row(name: str, show: Callable[[ArmResult], str]) -> list[str]:
        return [name, *map(show, arms)]

    yield row("requests (failed)", lambda arm: f"{arm.requests} ({arm.failed})")
    if not result.workload.ignore_eos:
        yield row("answers that ended by themselves", lambda arm: f"{arm.ended}")
    yield row("output tokens", lambda arm: f"{arm.output_tokens:,}")
    yield row("output tok/s", lambda arm: REFUSED if arm.tok_per_s is None else f"{arm.tok_per_s:,.1f}")
    yield row("time to first token, ms  p50 / p99", lambda arm: _show_spread(arm, arm.ttft_ms))
    yield row("gap per token, ms  p50 / p99", lambda arm: _show_spread(arm, arm.itl_ms))
    yield row("gap per chunk, ms  p50 / p99", lambda arm: _show_spread(arm, arm.chunk_gap_ms))
    yield row("whole request, ms  p50 / p99", lambda arm: _show_spread(arm, arm.e2e_ms))
    yield row("tokens per chunk, mean", lambda arm: _show_mean(arm.tokens_per_chunk))
    if any(arm.memory for arm in arms):
        yield row("engine memory, GiB (PSS)", lambda arm: _show_gib(arm.memory.pss_bytes if arm.memory else None))
    if any(arm.memory and arm.memory.gpu_bytes for arm in arms):
        yield row("engine memory, GiB (GPU)", lambda arm: _show_gib(arm.memory.gpu_bytes if arm.memory else None))
    for part in ("weights", "kv_cache", "graphs", "peak_activation"):
        if any(_find_bytes(arm, part) is not None for arm in arms):
            name = f"{part.replace('_', ' ')}, GiB"
            yield [name, *(_show_gib(_find_bytes(arm, part)) for arm in arms)]


def _find_bytes(arm: ArmResult, part: str) -> int | None:
    """Find what the engine says that a part of its memory takes."""
    found: int | None = getattr(arm.engine, f"{part}_bytes", None)
    return found


def _show_spread(arm: ArmResult, spread: Spread | None) -> str:
    """Show times of an arm; of answers of one chunk there is no gap, which nobody withholds."""
    if spread is None:
        return REFUSED if arm.tok_per_s is None else "none"
    return f"{spread.p50:.2f} / {spread.p99:.2f}"


def _show_mean(spread: Spread | None) -> str:
    return REFUSED if spread is None else f"{spread.mean:.2f}"


def _show_gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:.2f}"


def _list_findings(result: AbResult) -> Iterator[tuple[str, str]]:
    yield "speedup", _describe_speedup(result)
    if result.drift is not UNSET:
        yield "drift", result.drift.describe()
    yield "parity", _describe_parity(result.parity)
    control = result.parity.control
    if any(item.figure == "parity.control" for item in result.refused):
        yield "control", f"{REFUSED} (see below)"
    elif control is not None:
        yield (
            "control",
            (f"the baseline against itself: {control.mismatches} of {control.prompts} prompts differ"),
        )
    yield "acceptance", _describe_acceptance(result)
    if (forced := result.forced_acceptance) is not UNSET and forced.length is not None:
        yield "past end", f"{forced.length:.2f} tokens per step where the same answers had to go on past their end"
    if positions := result.acceptance.per_position:
        yield "by position", "  ".join(f"{share:.0%}" for share in positions)


def _describe_speedup(result: AbResult) -> str:
    speedup = result.speedup
    if speedup.point is None:
        return f"{REFUSED} (see below)"
    low_high = speedup.ci95
    interval = f"95% interval {low_high[0]:.2f}–{low_high[1]:.2f}" if low_high else f"95% interval {REFUSED}"
    unit = f"{result.workload.unit}s"
    return f"{speedup.point:.2f}× the baseline's tok/s ({interval}, paired over {speedup.pairs} {unit})"


def _describe_parity(parity: Parity) -> str:
    prompts, mismatches = parity.prompts, parity.mismatches
    if mismatches is None:
        return f"{REFUSED} (see below)"
    if prompts == 0:
        return "no prompt was answered by both arms"
    bound = parity.bound95
    reach = f"at 95% confidence at most {bound:.1%} of such prompts differ" if bound is not None else f"bound {REFUSED}"
    if mismatches == 0:
        return f"tokens and bytes identical on {prompts} of {prompts} prompts; {reach}"
    classes = ", ".join(
        f"{count} {name.replace('_', ' ')}{'s' * (count > 1)}"
        for name, count in (parity.classes or {}).items()
        if count
    )
    return f"{mismatches} of {prompts} prompts differ ({classes}); {reach}"


def _describe_acceptance(result: AbResult) -> str:
    acceptance = result.acceptance
    if acceptance.length is not None:
        return (
            f"{acceptance.length:.2f} tokens per step (at most {len(acceptance.per_position or []) + 1}); "
            f"{acceptance.rate:.1%} of the drafted tokens accepted"
        )
    if any(item.figure == "acceptance" for item in result.refused):
        return f"{REFUSED} (see below)"
    return "the candidate drafted nothing"


def _list_divergences(result: AbResult) -> list[str]:
    divergences = result.parity.divergences
    hidden = len(divergences) - SHOWN_DIVERGENCES
    more = [f"… and {hidden} more, in ab.json"] if hidden > 0 else []
    return [_describe_divergence(item) for item in divergences[:SHOWN_DIVERGENCES]] + more


def _describe_divergence(item: Verdict) -> str:
    where = "equal tokens" if item.index is None else f"after {item.index} equal tokens"
    text = f"prompt {item.prompt_id}, {where}: {item.classification.replace('_', ' ')}; {item.reason}"
    sides = (
        ("baseline", item.baseline_token, item.baseline_top2, item.baseline_reproduced),
        ("candidate", item.candidate_token, item.candidate_top2, item.candidate_reproduced),
    )
    for name, token, top2, reproduced in sides:
        if top2 is not None:
            pairs = ", ".join(f"{token} at {logprob:.4f}" for token, logprob in top2)
            again = "" if reproduced else " (its re-request gave another token)"
            text += f"; {name} chose {token} (log-probabilities: {pairs}){again}"
    return text


def _list_refusals(result: AbResult) -> list[str]:
    """One item per reason, with the figures that it withholds."""
    by_reason: dict[str, list[str]] = {}
    for item in result.refused:
        by_reason.setdefault(item.reason, []).append(item.figure)
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
