"""A certificate for people: as text for a terminal, as Markdown, and as one self-contained HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET

from laguna_serve.bench.certificate.locating import describe_rows
from laguna_serve.bench.certificate.result import Certificate, Divergence, LoadResult
from laguna_serve.bench.certificate.runner import ROW_CHECK
from laguna_serve.bench.certificate.verdict import AGAIN, DEFECT, DRIFT_RATIO, IDENTICAL, ROW_MATCHED
from laguna_serve.bench.harness.prompts import describe_load
from laguna_serve.bench.stats.intervals import bound_mismatch_rate
from laguna_serve.bench.stats.parity import CLASSES
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

WIDTH = 110
# Divergences printed in text and Markdown; HTML and JSON have every one.
SHOWN = 5
TEMPLATE = Path(__file__).with_name("certificate.html.j2")
HEADS = (
    "at once",
    "arm",
    "differ",
    "at 95% at most",
    "ties",
    "near ties",
    "defects",
    "not own best",
    "mean Δ",
    "max Δ",
)
ARM_NAMES = {"candidate": "candidate", AGAIN: "baseline again", ROW_MATCHED: "row-matched control"}


def summarise(result: Certificate) -> str:
    """Summarise the verdict in a sentence."""
    work, loads = result.workload, result.loads
    at = ", ".join(map(str, work.concurrency))
    scope = f"{describe_load(work.prompts, work.max_tokens, work.own_lengths)} at concurrency {at}"
    answers = sum(load.candidate.prompts for load in loads)
    mismatches = sum(load.candidate.mismatches for load in loads)
    if result.verdict == DEFECT:
        return f"Defect: {'; '.join(result.reasons)}. {scope}, {mismatches} of {answers} answers differ."
    bound = _bound_anywhere(result)
    if result.verdict == IDENTICAL:
        return (
            f"Identical: every token and byte of {scope} is the baseline's. At 95% confidence at most {bound:.2%} of "
            "such prompts differ at any of these loads."
        )
    defects = _bound_anywhere(result, ("defect",))
    return (
        f"Equal up to ties: {mismatches} of {answers} answers ({scope}) part from the baseline's, each where the two "
        f"tokens lie closer together than rounding can tell. At 95% confidence at most {bound:.2%} of such prompts "
        f"differ at any of these loads, and at most {defects:.2%} by more than rounding."
    )


def _bound_anywhere(result: Certificate, classes: Sequence[str] = CLASSES) -> float:
    """Bound the share of prompts that differ, in one of these ways, at one load or more."""
    divergences = [divergence for load in result.loads for divergence in load.candidate.divergences]
    differing = {divergence.prompt_id for divergence in divergences if divergence.classification in classes}
    return bound_mismatch_rate(len(differing), result.workload.prompts)


def tabulate(result: Certificate) -> Table:
    """One row per load and arm, in words and numbers."""
    rows = []
    for load in result.loads:
        for name, comparison in {"candidate": load.candidate, **load.controls}.items():
            difference = comparison.difference
            rows.append(
                [
                    str(load.concurrency),
                    ARM_NAMES[name],
                    f"{comparison.mismatches} of {comparison.prompts}",
                    f"{comparison.bound95:.2%}",
                    *(str(comparison.classes[kind]) for kind in CLASSES),
                    str(len(comparison.not_own_best)),
                    "–" if difference is None else f"{difference.mean:.2g}",
                    "–" if difference is None else f"{difference.max:.2g}",
                ]
            )
    return Table("rl" + "r" * (len(HEADS) - 2), HEADS, rows)


def list_notes(result: Certificate) -> list[str]:
    """List what else there is to say, a sentence each."""
    notes = [f"At concurrency {load.concurrency} {_describe_differences(load)}." for load in result.loads]
    if (replay := result.replay) is not None:
        p = replay.sign_test_p
        notes.append(
            f"Replay: of {replay.replayed} divergences the exact model sides with the baseline in "
            f"{replay.baseline}, with the candidate in {replay.candidate}, with neither in {replay.neither}"
            + ("." if p is None else f" (a fair coin is as lopsided with p = {p:.2g}).")
        )
    streams = [f"{check.differing} of {check.prompts} of the {name}'s" for name, check in result.streams.items()]
    notes.append(f"Streamed without log-probabilities, as users send them, {' and '.join(streams)} answers differ.")
    for name, arm in result.arms.items():
        tau = "" if arm.acceptance is None else f"; {arm.acceptance:.2f} tokens per step"
        root = "" if arm.root is None else f", which serves {arm.root}"
        notes.append(f"{name}: {arm.label}{root}{tau}.")
    notes += describe_rows(result.row_check) if result.row_check is not None else []
    names = {"reference": "replay", ROW_MATCHED: ARM_NAMES[ROW_MATCHED], ROW_CHECK: "word on the first operation"}
    notes += [f"No {names[name]}: {reason}." for name, reason in result.missing.items()]
    if result.identity is not None:
        notes.append(f"Identity {result.identity.sha256}; whether it applies elsewhere says certify.py --check.")
    return notes


@dataclass(frozen=True, slots=True)
class Located:
    """A divergence of the candidate at its load; `exact`: what the exact model says of it, in words."""

    load: int
    divergence: Divergence
    exact: str


def list_divergences(result: Certificate) -> list[Located]:
    """Every divergence of the candidate, defects first."""
    divergences = [
        Located(load.concurrency, divergence, _describe_replay(divergence))
        for load in result.loads
        for divergence in load.candidate.divergences
    ]
    return sorted(divergences, key=lambda item: item.divergence.classification != "defect")


def render_text(result: Certificate) -> str:
    """Render the certificate for a terminal, the verdict first."""
    lines = ["", *textwrap.wrap(summarise(result), WIDTH), ""]
    lines.append(tabulate(result).to_text())
    lines.append("")
    for note in list_notes(result):
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    divergences = list_divergences(result)
    if divergences:
        lines += ["", "where answers part:"]
        for item in divergences[:SHOWN]:
            lines += textwrap.wrap(_describe(item), WIDTH, initial_indent="- ", subsequent_indent="  ")
        if len(divergences) > SHOWN:
            lines.append(f"- … and {len(divergences) - SHOWN} more, in certificate.html")
    return "\n".join(lines)


def render_markdown(result: Certificate) -> str:
    """Render the same as a page."""
    lines = ["# Parity certificate", "", f"**{summarise(result)}**", ""]
    lines.append(tabulate(result).to_markdown())
    lines += ["", "Δ: difference of log-probabilities (nats) from the baseline's where tokens agree.", ""]
    lines += [f"- {note}" for note in list_notes(result)]
    divergences = list_divergences(result)
    if divergences:
        lines += ["", "## Where answers part", ""]
        lines += [f"- {_describe(item)}" for item in divergences[:SHOWN]]
        if len(divergences) > SHOWN:
            lines.append(f"- … and {len(divergences) - SHOWN} more, in certificate.html")
    if result.identity is not None:
        rows = [[name, value] for name, value in result.identity.parts.items()]
        lines += ["", "## Where it applies", "", Table("ll", ("part", "value"), rows).to_markdown()]
        lines += ["", f"SHA-256 of these: `{result.identity.sha256}`"]
    return "\n".join([*lines, "", cite_environment(result.environment)]) + "\n"


def render_html(result: Certificate) -> str:
    """One page without anything from elsewhere; every divergence in context."""
    from jinja2 import Environment, StrictUndefined  # comes with vLLM; only this page needs it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        result=result,
        summary=summarise(result),
        table=tabulate(result),
        notes=list_notes(result),
        divergences=list_divergences(result),
        versions=", ".join(f"{name} {version}" for name, version in result.environment.versions.items()),
    )


def _describe(item: Located) -> str:
    divergence = item.divergence
    where = "equal tokens" if divergence.index is None else f"token {divergence.index}"
    kind = divergence.classification.replace("_", " ")
    text = f"prompt {divergence.prompt_id}, {item.load} at once, {where}: {kind}; {divergence.reason}"
    sides = (
        ("baseline", divergence.baseline_token, divergence.baseline_top2),
        ("candidate", divergence.candidate_token, divergence.candidate_top2),
    )
    for arm, token, top2 in sides:
        if top2 is not None:
            pairs = ", ".join(f"{other} at {value:.4f}" for other, value in top2)
            text += f"; {arm} chose {token} ({pairs})"
    return f"{text}; {item.exact}" if item.exact else text


def _describe_differences(load: LoadResult) -> str:
    difference, drift = load.candidate.difference, load.drift
    if difference is not None and difference.max == 0:
        where = ", where tokens agree" if load.candidate.mismatches else ""
        return f"all {difference.n:,} log-probabilities of the candidate are the baseline's to the bit{where}"
    text = f"rounding may move log-probabilities by {load.noise:.3g} nats, as the controls show"
    if drift is None or drift.ratio is None or drift.ci95 is None:
        return text
    text += "; the candidate's lie {:.2f} times as far from the baseline's as the row-matched control's"
    text += " (95% interval {:.2f}–{:.2f}; above {} it is a defect)"
    return text.format(drift.ratio, *drift.ci95, DRIFT_RATIO)


def _describe_replay(divergence: Divergence) -> str:
    replay = divergence.replay
    if replay is UNSET:
        return ""
    by = "" if replay.margin is None else f" by {replay.margin:.3g} nats"
    if replay.preferred == "neither":
        return "the exact model prefers a third token"
    return f"the exact model prefers the {replay.preferred}'s{by}"
