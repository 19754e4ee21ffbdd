"""The invariance result for people: as text for a terminal and as Markdown, verdict first."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence

from laguna_serve.evals.equivalence.comparison import LEVELS, REWARD, TOKENS, UNEXPLAINED
from laguna_serve.evals.equivalence.result import Divergence, InvarianceResult, LevelCounts
from laguna_serve.evals.equivalence.verdict import (
    COULD_NOT_TELL,
    DIFFERS,
    EXPLAINED,
    INVARIANT,
    NOISE,
    UNCLEAR,
)
from laguna_serve.serving.kit.environment import cite_environment
from laguna_serve.serving.kit.tables import Table

WIDTH = 110
# Divergences, and requests that failed, printed in text; Markdown and JSON have every one.
SHOWN = 5
ROWS = {**{level: level for level in LEVELS}, UNEXPLAINED: "beyond rounding"}
HEADER = ("level", "baseline", "candidate", "between", "at 95%", "p, apart", "p, scatter")


def summarise(result: InvarianceResult) -> str:
    """Summarise the verdict in a sentence or three."""
    work, verdict = result.workload, result.verdict
    scope = f"{work.problems} problems, each answered {work.repeats} times by each arm"
    if verdict == COULD_NOT_TELL:
        return f"Could not tell: {'; '.join(result.reasons)}. {scope}."
    levels = result.levels or {}
    tokens, rewards = levels[TOKENS], levels[REWARD]
    if verdict == INVARIANT:
        return (
            f"Invariant on {work.problems} problems: every token, byte, program and reward is the same ({scope}). "
            f"At 95% confidence at most {tokens.bound95:.2%} of such problems differ."
        )
    counts = f"Tokens differ on {tokens.across} and rewards on {rewards.across} of {scope}."
    if verdict == EXPLAINED:
        return (
            f"Explained: tokens part only where two lie closer together than rounding can tell, and no reward differs; "
            f"at 95% confidence one does on at most {rewards.bound95:.2%} of such problems. {counts}"
        )
    if verdict == NOISE:
        return (
            f"Noise: the arms differ, but the tests cannot tell it from what the engine does to itself. {counts} With "
            f"itself the baseline differs on {levels[TOKENS].within_baseline} (rewards: "
            f"{rewards.within_baseline}), the candidate on {levels[TOKENS].within_candidate} "
            f"({rewards.within_candidate})."
        )
    assert verdict in (DIFFERS, UNCLEAR)
    return f"{verdict.capitalize()}: {'; '.join(result.reasons)}. {counts}"


def render_text(result: InvarianceResult) -> str:
    """Render the result as lines for a terminal."""
    lines = ["", *textwrap.wrap(summarise(result), WIDTH)]
    if result.levels:
        lines += ["", "problems with answers that differ: within the baseline, within the candidate, between them"]
        lines += [tabulate(result.levels).to_text(), ""]
    for note in list_notes(result):
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    parted = [describe_divergence(item) for item in result.divergences or ()]
    lines += ["", "where answers part:"] if parted else []
    for line in parted[:SHOWN]:
        lines += textwrap.wrap(line, WIDTH, initial_indent="- ", subsequent_indent="  ")
    if len(parted) > SHOWN:
        lines.append(f"- … and {len(parted) - SHOWN} more, in invariance.md")
    return "\n".join(lines)


def render_markdown(result: InvarianceResult) -> str:
    """Render the same as a page, with the programs that differ."""
    lines = ["# Invariance", "", f"**{summarise(result)}**", ""]
    if result.levels:
        lines.append(tabulate(result.levels).to_markdown())
        lines += [
            "",
            "Problems with answers that differ: of the baseline from its own, of the candidate from its own, of one "
            "arm from the other, and the upper bound on the rate of the last. p: could the arms' labels be exchanged "
            "(exact; are the arms apart, does the candidate scatter more)?",
            "",
        ]
    lines += [f"- {note}" for note in list_notes(result)]
    if confirmation := result.confirmation:
        lines += ["", f"## Confirmation: {confirmation.repeats} more answers to what was suspicious", ""]
        lines.append(tabulate(confirmation.levels).to_markdown())
    if result.divergences:
        lines += ["", "## Where answers part", ""]
        for item in result.divergences:
            lines += [f"- {describe_divergence(item)}", *_render_programs(item)]
    if result.failures:
        lines += ["", "## Requests that failed", ""]
        lines += [f"- {key}: {reason}" for key, reason in result.failures.items()]
    return "\n".join([*lines, "", cite_environment(result.environment)]) + "\n"


def tabulate(levels: Mapping[str, LevelCounts]) -> Table:
    """Tabulate the counts, a row per level."""
    rows = []
    for level, name in ROWS.items():
        found = levels[level]
        counts = (found.within_baseline, found.within_candidate, found.across)
        numbers = [f"{count} of {found.problems}" for count in counts]
        bound = "–" if found.bound95 is None else f"{found.bound95:.2%}"
        rows.append((name, *numbers, bound, f"{found.apart_p:.3g}", f"{found.scatter_p:.3g}"))
    return Table("l" + "r" * (len(HEADER) - 1), HEADER, rows)


def list_notes(result: InvarianceResult) -> list[str]:
    """List what else there is to know, a sentence each."""
    work, notes = result.workload, []
    if (rewards := result.rewards) and (nats := result.difference_nats):
        low, high = rewards.ci95
        notes.append(
            f"Mean reward: baseline {rewards.baseline:.4f}, candidate {rewards.candidate:.4f}; difference "
            f"{rewards.difference:+.4f}, paired over problems, 95% interval {low:+.4f} to {high:+.4f}."
        )
        notes.append(
            f"Where tokens agree, log-probabilities differ by at most {nats.any_two:.3g} nats, within one arm by "
            f"{nats.one_arm:.3g}; what rounding can do is taken to be {result.noise_nats:.3g} (at least the spacing of "
            "logits)."
        )
    if confirmation := result.confirmation:
        notes.append(
            f"Suspicious and asked {confirmation.repeats} more times of each arm: {', '.join(confirmation.problems)}."
        )
    order = "requests of both arms mixed" if work.interleaved else "one arm after the other, for want of memory"
    notes.append(
        f"{work.problems_file}, {work.form} form, greedy, at most {work.max_tokens} tokens, "
        f"{work.concurrency} at once; {order}."
    )
    for name, arm in result.arms.items():
        drafted = "" if arm.acceptance is None else f"; {arm.acceptance:.2f} tokens per step"
        notes.append(f"{name}: {arm.label}{drafted}.")
    failures = list((result.failures or {}).items())
    notes += [f"Failed: {key}: {reason}" for key, reason in failures[:SHOWN]]
    return notes


def describe_divergence(item: Divergence) -> str:
    """Describe a divergence in a line."""
    where = "equal tokens" if item.index is None else f"token {item.index}"
    text = f"{item.task_id}: {', '.join(item.levels)} differ from {where} on: "
    text += f"{item.classification.replace('_', ' ')}; {item.reason}"
    text += (
        f"; baseline {_show_choice(item.baseline_token, item.baseline_text, item.baseline_top2, item.baseline_margin)}"
    )
    choice = _show_choice(item.candidate_token, item.candidate_text, item.candidate_top2, item.candidate_margin)
    text += f"; candidate {choice}"
    for arm in item.unsteady:
        text += f"; the {arm} parts from itself too"
    if REWARD in item.levels:
        rewards = [", ".join(f"{one:g}" for one in each) for each in (item.rewards.baseline, item.rewards.candidate)]
        text += f"; rewards {rewards[0]} against {rewards[1]}"
    return text


def _show_choice(token: int | None, shown: str, top2: Sequence[tuple[int, float]] | None, margin: float | None) -> str:
    text = f"{token} {shown!r}" if token is not None else repr(shown)
    if top2 is not None:
        text += f" ({', '.join(f'{token} at {value:.4f}' for token, value in top2)}"
        text += ")" if margin is None else f"; margin {margin:.3g})"
    return text


def _render_programs(item: Divergence) -> list[str]:
    """Render a unified diff of the two programs, in a fence longer than any run of backticks in it."""
    if not item.programs:
        return []
    baseline, candidate = (program.splitlines() for program in item.programs)
    diff = "\n".join(difflib.unified_diff(baseline, candidate, "baseline", "candidate", lineterm=""))
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", diff))])
    return ["", *(f"  {line}".rstrip() for line in f"{fence}diff\n{diff}\n{fence}".split("\n")), ""]
