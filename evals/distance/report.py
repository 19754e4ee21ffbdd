"""The distance between references for people: a row for each, on a terminal and as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

from laguna_serve.evals.distance.result import MeasuredReference, ReferencesResult, Score
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

WIDTH = 110
NONE = "–"
HEADS = (
    *("reference", "tokens", "steps", "tok/s", "identical answers", "same tokens"),
    *("loss", "Δ loss (95%)", "Python lines", "Δ points (95%)"),
)
QUALITY = (
    "Each reference is exact in itself and writes other texts than the others. What stands here is how far they are "
    "from the baseline's: a matter of quality. No row is called lossless against another, small as a difference may be."
)
COLUMNS = (
    "tokens: mean length of an answer, with the token that ends it. steps: denoising steps per answer.",
    "tok/s: tokens ÷ seconds of the requests, prompts and first requests included; bench/ab.py compares speeds.",
    "identical answers: prompts whose two answers have the same tokens, all of them.",
    "same tokens: positions at which both answers have the same token, up to the shorter one's end, ÷ the positions of "
    "the longer one, summed over prompts; once an answer has a token more, all behind it may count as others.",
    "loss: nats per token of an answer given its prompt, under the judge, mean over prompts. A text that repeats "
    "itself has a low loss: read it beside the lines.",
    "Python lines: share of an answer's lines that are Python by themselves, mean over prompts; repeated lines earn "
    "nothing.",
    "Δ: minus the baseline's on the same prompt, mean over prompts (of the lines in percentage points), with the 95% "
    "bootstrap interval, prompts drawn.",
)


def make_table(result: ReferencesResult) -> Table:
    """Make the table, a row per reference."""
    rows = [_make_row(name, one, result.workload.prompts) for name, one in result.references.items()]
    return Table("l" + "r" * (len(HEADS) - 1), HEADS, rows)


def render_text(result: ReferencesResult) -> str:
    """Render the table and what is to be known of it."""
    lines = ["", make_table(result).to_text(), "", *textwrap.wrap(QUALITY, WIDTH)]
    for note in list_notes(result):
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def render_markdown(result: ReferencesResult) -> str:
    """Render the same as a page, with what every column counts."""
    lines = ["# What another reference costs", "", QUALITY, "", make_table(result).to_markdown(), ""]
    lines += [f"- {note}" for note in (*COLUMNS, *list_notes(result))]
    return "\n".join([*lines, "", cite_environment(result.environment)]) + "\n"


def list_notes(result: ReferencesResult) -> Iterator[str]:
    """List what was asked, by whom it was answered and judged, and what was left out."""
    work, judge = result.workload, result.judge
    yield (
        f"{work.prompts_file}: {work.prompts} prompts × up to {work.max_tokens} tokens, greedy, "
        f"{work.concurrency} at once."
    )
    if work.cut:
        yield f"{work.cut} of {work.prompts} prompts were cut from the left to {work.longest} tokens."
    for name, one in result.references.items():
        yield f"{name}: {one.label}."
    yield f"judge: {judge.label}."
    if judge.shortened:
        yield f"Of {judge.shortened} prompts the judge read the end alone, as its context is too short for them."
    if judge.unscored:
        yield f"{judge.unscored} prompts have no loss, as some reference's answer to them is empty."


def _make_row(name: str, one: MeasuredReference, prompts: int) -> tuple[str, ...]:
    speed, distance = one.speed, one.distance
    return (
        name,
        f"{one.tokens_per_answer:.1f}",
        NONE if speed is None or speed.steps_per_answer is None else f"{speed.steps_per_answer:.1f}",
        NONE if speed is None else f"{speed.tokens_per_s:.0f}",
        NONE if distance is None else f"{distance.identical} of {prompts}",
        NONE if distance is None else f"{distance.share:.1%}",
        *_show_score(one.loss, "{:.3f}".format, "{:+.3f}".format),
        *_show_score(one.python_lines, "{:.1%}".format, _show_points),
    )


def _show_points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _show_score(
    found: Score | None, show: Callable[[float], str], show_signed: Callable[[float], str]
) -> tuple[str, str]:
    if found is None:
        return NONE, NONE
    if found.difference is None:
        return show(found.mean), NONE
    interval = "" if found.ci95 is None else f" ({show_signed(found.ci95[0])} to {show_signed(found.ci95[1])})"
    return show(found.mean), show_signed(found.difference) + interval
