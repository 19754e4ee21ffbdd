"""What is kept of a run: the records, counters and engine facts of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from laguna_serve.bench.arms.arms import ARMS, BASELINE
from laguna_serve.bench.stats.parity import find_mismatch
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.engine.figures import EngineFigures
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.machine.memory import EngineMemory


@dataclass(slots=True)
class ArmRun:
    """The records, counters and engine facts of one arm.

    `rounds` maps the round's index to its records; the counters frame exactly those rounds, unless `cut`: then a
    request that was broken off may be in the counters but not in the records. `forced`: what was counted over the same
    prompts when answers had to go on past their end; `figures`: what the engine says of itself. `sampled`: answers are
    drawn at a temperature, and not to be compared.
    """

    label: str
    command: list[str] | None = None
    rounds: dict[int, list[Record]] = field(default_factory=dict)
    before: Counters | None = None
    after: Counters | None = None
    cut: bool = False
    forced: Counters | None = None
    control: list[Record] = field(default_factory=list)
    probes: dict[str, Probe] = field(default_factory=dict)
    memory: EngineMemory | None = None
    figures: EngineFigures | None = None
    sampled: bool = False

    @property
    def records(self) -> dict[str, Record]:
        """Timed records by prompt id."""
        return {record.prompt_id: record for records in self.rounds.values() for record in records}


@dataclass(slots=True)
class Run:
    """A whole run. `stopped` says why it ended early, `interrupted` that a person (or a signal) ended it.

    One engine at a time (not `interleaved`), `again` is the baseline's last pass, after the candidate's.
    """

    arms: dict[str, ArmRun]
    again: ArmRun | None = None
    interleaved: bool = True
    stopped: str | None = None
    interrupted: bool = False

    @property
    def mismatched(self) -> list[str]:
        """Prompt ids whose answers differ between the arms."""
        return list_mismatches(*(self.arms[name] for name in ARMS))

    def passes(self, name: str) -> list[ArmRun]:
        """All that an arm ran."""
        return [self.arms[name], *([self.again] if self.again is not None and name == BASELINE else [])]


class MeasurementStoppedError(CommandError, RuntimeError):
    """The run cannot go on; what was measured stays."""


def list_mismatches(baseline: ArmRun, candidate: ArmRun) -> list[str]:
    """Prompt ids whose answers differ; none of answers that were drawn."""
    if baseline.sampled or candidate.sampled:
        return []
    others = candidate.records
    return [
        prompt_id
        for prompt_id, record in baseline.records.items()
        if (other := others.get(prompt_id)) is not None
        and record.error is None
        and other.error is None
        and find_mismatch(record, other) is not None
    ]


def counter_delta(arm: ArmRun) -> Counters | None:
    """Return what the arm's counters gained over the timed rounds; None when it ended before they were read again."""
    return None if arm.before is None or arm.after is None else arm.after.since(arm.before)


def wall_s(records: Sequence[Record]) -> float:
    """Seconds from the first request sent to the last answer ended."""
    return (max(record.ended_ns for record in records) - min(record.started_ns for record in records)) / 1e9
