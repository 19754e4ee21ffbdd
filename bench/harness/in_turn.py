"""Measures one engine at a time, the baseline first and last, and keeps every pass in a folder.

A pass is one engine's half of a measurement: all rounds of one part (a concurrency, a batch) on one arm, in a file
`003.gamma7.c4.json` by its number, arm and part. The same command goes on with what is missing. A candidate's pass is
held against the baseline's passes before and after it. An engine that was started again after an interruption, perhaps
on another day, is therefore preceded by the baseline, unless that was the last to be measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from msgspec import Struct

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, Arm, ArmSpec, open_arm
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, Run, list_mismatches
from laguna_serve.bench.harness.runner import join_passes, measure_alone
from laguna_serve.bench.harness.schedule import Plan
from laguna_serve.bench.harness.validity import find_faults
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

P = TypeVar("P", bound=Struct)


class Made(NamedTuple):
    """A pass that is in the folder."""

    number: int
    arm: str
    part: str


class Bracket(NamedTuple, Generic[P]):
    """A candidate's pass between the baseline's."""

    before: P
    candidate: P
    after: P


class Passes(Generic[P]):
    """The passes in a folder, in the order in which they were made; what is kept of each is a `kind`."""

    def __init__(self, folder: Path, kind: type[P]) -> None:
        self.folder, self._kind = folder, kind

    def list_made(self, part: str | None = None) -> list[Made]:
        """Every pass, or those of a part."""
        names = (path.name.removesuffix(".json").split(".", 2) for path in self.folder.glob("*.*.*.json"))
        made = sorted(Made(int(number), arm, of) for number, arm, of in names if number.isdecimal())
        return [one for one in made if part in (None, one.part)]

    def read(self, made: Made) -> P:
        """Read a pass. Raises ResultError when the file is not what it should be."""
        return read_result(self._find_path(made), self._kind)

    def add(self, arm: str, part: str, kept: P) -> None:
        """Keep a pass as the latest."""
        made = self.list_made()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_result(self._find_path(Made(made[-1].number + 1 if made else 1, arm, part)), kept)

    def plan(self, part: str, candidates: Sequence[str]) -> list[str]:
        """Plan the arms of a part that are to be measured, in their order; empty where everything is there."""
        made = [one.arm for one in self.list_made(part)]
        missing = [name for name in candidates if name not in made]
        closed = bool(made) and made[-1] == BASELINE
        if not missing:
            return [] if closed or not made else [BASELINE]
        return [*([] if closed else [BASELINE]), *missing, BASELINE]

    def find_bracket(self, arm: str, part: str) -> Bracket[P] | None:
        """Find the latest pass of a candidate between the baseline's nearest.

        None where one of the three is missing.
        """
        made = self.list_made(part)
        number = max((one.number for one in made if one.arm == arm), default=None)
        if number is None:
            return None
        before = [one for one in made if one.arm == BASELINE and one.number < number]
        after = [one for one in made if one.arm == BASELINE and one.number > number]
        if not before or not after:
            return None
        return Bracket(self.read(before[-1]), self.read(Made(number, arm, part)), self.read(after[0]))

    def _find_path(self, made: Made) -> Path:
        return self.folder / f"{made.number:03d}.{made.arm}.{made.part}.json"


def measure_in_turn(
    specs: Sequence[ArmSpec],
    wanted: Mapping[str, Sequence[str]],
    passes: Passes[P],
    measure: Callable[[Arm, str], P],
    progress: Progress,
) -> dict[str, str]:
    """Make the passes that are missing: the first of `specs` is the baseline, the others are measured in between.

    `wanted`: of each part the candidates, by name. `measure` makes one pass over a part.

    Returns the candidates that could not be measured, and why; they do not lose the others.

    Raises:
        EngineError, EndpointError, MeasurementStoppedError: the baseline could not be measured.
    """
    baseline, *candidates = specs
    plans = {part: passes.plan(part, names) for part, names in wanted.items()}
    if any(plans.values()) and passes.list_made():
        progress.say(f"continuing: {len(passes.list_made())} passes are there")

    def visit(spec: ArmSpec, parts: Sequence[str]) -> None:
        if not parts:
            return
        passes.folder.mkdir(parents=True, exist_ok=True)
        with open_arm(spec, passes.folder, progress.say) as arm:
            for part in parts:
                progress.say(f"{spec.name}, {part}")
                passes.add(spec.name, part, measure(arm, part))

    visit(baseline, [part for part, arms in plans.items() if len(arms) > 1 and arms[0] == BASELINE])
    failed: dict[str, str] = {}
    for spec in candidates:
        try:
            visit(spec, [part for part, arms in plans.items() if spec.name in arms])
        except (EngineError, EndpointError, MeasurementStoppedError) as error:
            failed[spec.name] = str(error)
            progress.say(f"{spec.name} failed and is left out: {error}")
    visit(baseline, [part for part, arms in plans.items() if arms and passes.list_made(part)[-1].arm != BASELINE])
    return failed


def run_pass(
    arm: Arm,
    part: str,
    plans: Mapping[str, Plan],
    passes: Passes[P],
    get_run: Callable[[P], ArmRun],
    progress: Progress,
) -> ArmRun:
    """One pass over a part's plan. Answers that differ are examined: a candidate's, and last the baseline's.

    Raises:
        EngineError, EndpointError, MeasurementStoppedError: the engine died, or requests failed.
    """
    into, made = ArmRun(arm.spec.label), passes.list_made(part)
    bases = [one for one in made if one.arm == BASELINE]

    def find_differing() -> list[str]:
        if not bases:
            return []
        base = get_run(passes.read(bases[-1]))
        if arm.name != BASELINE:
            return list_mismatches(base, into)
        since = [get_run(passes.read(one)) for one in made if one.number > bases[-1].number]
        return [prompt_id for run in since for prompt_id in list_mismatches(base, run)]

    asyncio.run(measure_alone(plans[part], arm, into, progress, find_differing))
    if faults := find_faults(arm.name, into):
        raise MeasurementStoppedError("; ".join(faults))
    return into


def join_run(before: ArmRun, candidate: ArmRun, after: ArmRun) -> Run:
    """Join three passes to the run that they make together."""
    run = Run({BASELINE: before, CANDIDATE: candidate})
    join_passes(run, after)
    return run
