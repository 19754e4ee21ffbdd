"""What training a drafter will take, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.machine.memory import GIB


class HeldOutTau(msgspec.Struct, frozen=True, kw_only=True):
    """Acceptance at one temperature.

    Attributes:
        drafts: how they are chosen (`--draft-sampling`): the drafter's likeliest tokens, or drawn ones.
        tau: tokens per step, the target's own counted.
        ci95: its 95% interval over prompts (bootstrap).
        per_position: of the drafts, the share whose token 1 … γ was accepted; their sum + 1 is `tau`.
        steps: with a draft; expected ones, where drafts are drawn.
        answers: that were measured on.
    """

    temperature: float
    drafts: str
    tau: float
    ci95: tuple[float, float]
    per_position: tuple[float, ...]
    steps: float
    answers: int


class DrafterTrainPlan(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.drafter_train_plan/1"
):
    """What is needed, from headers and the tokens alone.

    Attributes:
        answers, tokens: that are read; of what is not generated yet at most so many.
        generated, missing: answers that the target is asked for, and those of them that are not there yet.
        held_out_prompts: that are measured on and never learned from.
        taps: the target's layers that are tapped, counted from 0.
        states_bytes: hidden states on disk, at the most.
        states_memory_bytes: while they are computed, besides Python and its libraries, at the most.
        training_memory_bytes: of drafter, gradients, optimiser, the target's embedding and head, and a step's logits.
    """

    target: str
    warm_start: str | None
    format: str
    taps: tuple[int, ...]
    parameters: int
    prompts: int
    held_out_prompts: int
    answers: int
    tokens: int
    generated: int
    missing: int
    states_bytes: int
    states_memory_bytes: int
    training_memory_bytes: int


class DrafterTrainResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.drafter_train/1"
):
    """A trained drafter, and how many of its drafts are accepted on answers that it has not learned from.

    Attributes:
        temperatures: that it was trained at.
        tokens: of the answers that it learned from, prompts included; `answers` are their number.
        skipped: recorded answers that were too short, or had too long a prompt.
        before, after: acceptance on the held-out answers (training/drafter/held_out.py has the formula).
        log: records of step, loss and tau while it was trained.
    """

    environment: Environment
    target: str
    warm_start: str | None
    out: str
    format: str
    loss: Literal["ce", "dspark"]
    steps: int
    seed: int
    parameters: int
    temperatures: tuple[float, ...]
    answers: int
    tokens: int
    skipped: int
    before: list[HeldOutTau]
    after: list[HeldOutTau]
    minutes: float
    log: list[dict[str, float]]


def find_gains(result: DrafterTrainResult) -> list[float]:
    """τ after less τ before, at the temperatures that were trained at, or at all where none of them was measured."""
    before = {(tau.temperature, tau.drafts): tau.tau for tau in result.before}
    gains = {key: tau.tau - before[key] for tau in result.after if (key := (tau.temperature, tau.drafts)) in before}
    trained = [gain for (temperature, _), gain in gains.items() if temperature in result.temperatures]
    return trained or list(gains.values())


def format_plan(plan: DrafterTrainPlan) -> str:
    """Format the plan, a line for each thing that is needed."""
    generated = f", {plan.missing} of {plan.generated} still to be generated" if plan.generated else ""
    rows = [
        ("target", f"{plan.target}, taps {', '.join(map(str, plan.taps))}"),
        ("drafter", f"{plan.format} format, {plan.parameters:,} parameters, {plan.warm_start or 'new'}"),
        ("prompts", f"{plan.prompts}, {plan.held_out_prompts} of them held out"),
        ("answers", f"{plan.answers}{generated}"),
        ("tokens", f"{plan.tokens:,} at the most"),
        ("hidden states", f"{plan.states_bytes / GIB:.2f} GiB on disk at the most"),
        ("memory", f"{plan.states_memory_bytes / GIB:.2f} GiB for the states at the most"),
        ("", f"{plan.training_memory_bytes / GIB:.2f} GiB for training"),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


def format_result(result: DrafterTrainResult) -> str:
    """Format the table of acceptance."""
    lines = [
        f"{result.out}: {result.format} format, {result.parameters:,} parameters, {result.steps} steps of {result.loss}"
        f" on {result.answers:,} answers ({result.tokens:,} tokens)",
        "",
        "held out                    τ before                τ after",
    ]
    lines += [_format_row(after, result.before) for after in result.after]
    return "\n".join(lines)


def _format_row(after: HeldOutTau, before: Sequence[HeldOutTau]) -> str:
    key = (after.temperature, after.drafts)
    earlier = next((tau for tau in before if (tau.temperature, tau.drafts) == key), None)
    name = f"T {after.temperature:g}, {after.drafts} drafts"
    return f"{name:<27} {'–' if earlier is None else _show(earlier):<23} {_show(after)}"


def _show(tau: HeldOutTau) -> str:
    return f"{tau.tau:.2f} ({tau.ci95[0]:.2f}–{tau.ci95[1]:.2f})"
