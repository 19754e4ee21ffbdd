"""Does a schedule of γ by batch size beat the best single γ? Both engines under a load that changes all the time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from laguna_serve.bench.gamma.points import MIN_WARMUP, make_config, measure_plan
from laguna_serve.bench.harness.arms import ArmSpec, open_arm
from laguna_serve.bench.harness.prompts import split_prompts
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE, Plan, Round, make_plan
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.files import write_json
from laguna_serve.serving.kit.progress import Progress

Schedule = Sequence[tuple[int, int, int]]
# Rounds of every concurrency: enough pairs for an interval.
CYCLES = 12


def find_best_single(points: Sequence[Mapping[str, Any]]) -> int:
    """The γ, 0 for plain decoding, that needs the least time for a load in which every concurrency takes its turn with
    as many prompts, by the measured rates."""
    concurrencies = sorted({point["concurrency"] for point in points})
    rates: dict[int, dict[int, float]] = {}
    for point in points:
        rates.setdefault(point["gamma"], {})[point["concurrency"]] = point["tok_per_s"][CANDIDATE]
        rates.setdefault(0, {})[point["concurrency"]] = point["tok_per_s"][BASELINE]
    whole = {gamma: by for gamma, by in rates.items() if len(by) == len(concurrencies)}
    return min(whole, key=lambda gamma: sum(c / whole[gamma][c] for c in concurrencies))


def compare_schedule(
    args: argparse.Namespace,
    points: Sequence[Mapping[str, Any]],
    schedule: Schedule,
    prompts: list[Prompt],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """An A/B of the best single γ (baseline) and the schedule (candidate), or why there is none to make.

    Raises:
        EngineError, EndpointError, MeasurementStoppedError: it could not be made.
    """
    single, wanted = find_best_single(points), [list(entry) for entry in schedule]
    if len({entry[2] for entry in schedule}) == 1:
        return {"single": single, "skipped": "the schedule is a single γ", "speedup": None}
    place = folder / "mixed.json"
    if place.exists():
        done: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if (done["single"], done["schedule"]) == (single, wanted):
            return done
    specs = (
        ArmSpec(BASELINE, f"γ {single} throughout", config=make_config(args, single or None)),
        ArmSpec(CANDIDATE, f"γ by batch size: {list(schedule)}", config=_make_scheduled(args, schedule)),
    )
    plan = make_mixed_plan(args, prompts)
    with open_arm(specs[0], folder, progress.say) as ours, open_arm(specs[1], folder, progress.say) as theirs:
        progress.say(f"mixed load: rounds of {', '.join(map(str, args.concurrency))} prompts, interleaved")
        result, _ = measure_plan(args, plan, (ours, theirs), progress, drafting=True)
    found = {
        "single": single,
        "schedule": wanted,
        "skipped": None,
        "rounds": len(plan.rounds),
        "prompts": len(plan.prompts),
        "speedup": result.speedup.point,
        "ci95": result.speedup.ci95,
        "parity": {key: value for key, value in msgspec.to_builtins(result.parity).items() if key != "divergences"},
    }
    write_json(place, found)
    return found


def make_mixed_plan(args: argparse.Namespace, prompts: list[Prompt]) -> Plan:
    """Interleaved rounds of every concurrency, CYCLES times or as long as there are prompts."""
    count = min(len(prompts), CYCLES * sum(args.concurrency))
    timed, warmup = split_prompts(prompts, count, max(MIN_WARMUP, *args.concurrency))
    plan = make_plan(timed, warmup, max_tokens=args.max_tokens, concurrency=1, control=0, seed=args.seed)
    rounds: list[Round] = []
    left = timed
    for size in cycle(args.concurrency):
        if len(left) < size:
            break
        rounds.append(tuple(left[:size]))
        left = left[size:]
    return replace(plan, rounds=tuple(rounds), orders=plan.orders[: len(rounds)], concurrency=max(args.concurrency))


def _make_scheduled(args: argparse.Namespace, schedule: Schedule) -> EngineConfig:
    most = max(entry[2] for entry in schedule)
    return replace(make_config(args, most), gamma_schedule=tuple((first, last, k) for first, last, k in schedule))
