"""The parts of the proof, each on a live cluster: replicas are killed, come and go, and get new weights."""

from __future__ import annotations

import copy
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.bench.cluster.load import Asker, Loop, compare
from laguna_serve.bench.cluster.local import Application, deploy, find_engine_core
from laguna_serve.bench.cluster.result import Agreement, Failure, Loss, Scaling, Updates
from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState
from laguna_serve.serving.kit.results import JsonObject

# A replica starts in half a minute where two cores are shared.
PATIENCE_S = 300.0
LOAD_S = 120.0
NEW = "swapped-1"


@dataclass(frozen=True)
class Bench:
    """What every part works with: an application, a client for it, prompts, and how many streams there are at once."""

    application: Application
    asker: Asker
    prompts: Sequence[str]
    clients: int

    def loop(self) -> Loop:
        """Make a closed loop of streams."""
        return Loop(self.asker, self.prompts, self.clients)

    def wait_for_replicas(self, count: int, lost: int | None = None) -> list[ReplicaState]:
        """Wait until so many replicas answer, none of them in the process `lost`."""

        def ready(found: list[ReplicaState]) -> bool:
            return len(found) == count and all(state.pid != lost for state in found)

        return self.application.wait_for(f"{count} replicas", ready, PATIENCE_S)


def kill_replica(state: ReplicaState) -> None:
    """Kill the process of a replica; its engine's supervisor ends the rest."""
    os.kill(state.pid, signal.SIGKILL)


def kill_engine(state: ReplicaState) -> None:
    """Kill the process of a replica's engine that computes."""
    find_engine_core(state.pid).kill()


def measure_loss(bench: Bench, killed: str, kill: Callable[[ReplicaState], None]) -> Loss:
    """Kill something of one of the replicas under load, and see what clients see until all is as before."""
    before = bench.wait_for_replicas(2)
    with bench.loop() as loop:
        loop.wait_for(lambda ended: len(ended) >= 2 * bench.clients, LOAD_S)
        usual = statistics.median(one.ended_s - one.begun_s for one in loop.ended if one.error is None)
        kill(before[0])
        killed_s = time.monotonic()
        bench.wait_for_replicas(2, lost=before[0].pid)
        recovered_s = time.monotonic() - killed_s
        loop.wait_for(lambda ended: ended[-1].begun_s > killed_s + recovered_s, LOAD_S)
    after = [one for one in loop.ended if one.ended_s > killed_s]
    whole = [one.ended_s - one.begun_s for one in after if one.error is None]
    failures = [
        Failure(after_s=round(one.ended_s - killed_s, 2), error=one.error, events=one.events)
        for one in after
        if one.error is not None
    ]
    return Loss(
        killed=killed,
        clients=bench.clients,
        sent=len(after),
        failed=len(failures),
        failures=failures,
        longest_s=round(max(whole, default=0.0), 2),
        usual_s=round(usual, 2),
        recovered_s=round(recovered_s, 1),
    )


def measure_scaling(bench: Bench, tables: JsonObject) -> Scaling:
    """Measure how Ray adds a replica under load and ends it without; the application is deployed anew for that."""
    scaled = copy.deepcopy(tables)
    replicas: JsonObject = scaled["models"][0]["replicas"]
    replicas |= {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": bench.clients / 2}
    replicas |= {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0, "look_back_period_s": 4.0}
    deploy(scaled)
    bench.wait_for_replicas(1)
    with bench.loop() as loop:
        begun_s = time.monotonic()
        bench.wait_for_replicas(2)
        up_s = time.monotonic() - begun_s
    begun_s = time.monotonic()
    bench.wait_for_replicas(1)
    return Scaling(
        clients=bench.clients,
        target_ongoing_requests=bench.clients / 2,
        upscale_delay_s=1.0,
        downscale_delay_s=5.0,
        up_s=round(up_s, 1),
        down_s=round(time.monotonic() - begun_s, 1),
        requests=len(loop.ended),
        failed=sum(one.error is not None for one in loop.ended),
    )


def measure_updates(
    bench: Bench, weights: Path, expected: Mapping[str, tuple[int, ...]], wait_for_late: Callable[[], str]
) -> Updates:
    """Give two replicas new weights under load, start one more, and try weights that are not there.

    `expected` are the new weights' answers; `wait_for_late` lets one replica start, and returns its name.
    """
    states = bench.wait_for_replicas(2)
    with bench.loop() as loop:
        loop.wait_for(lambda ended: len(ended) >= bench.clients, LOAD_S)
        begun_s = time.monotonic()
        report = bench.application.update(NewWeights(update=[{"folder": str(weights)}], weight_version=NEW))
        ended_s = time.monotonic()
    during = [one for one in loop.ended if one.begun_s < ended_s and one.ended_s > begun_s]
    after = compare(bench.asker.ask_all(bench.prompts), expected, bench.prompts)
    late_name = wait_for_late()
    late, version = ask_one_replica(bench, late_name, expected)
    refused = bench.application.update(NewWeights(update=[{"folder": f"{weights}-nowhere"}], weight_version="nowhere"))
    refused_after = compare(bench.asker.ask_all(bench.prompts), expected, bench.prompts)
    return Updates(
        replicas=len(states),
        seconds=report.seconds,
        outcome=report.outcome,
        during=len(during),
        during_failed=sum(one.error is not None for one in during),
        after=after,
        late=late,
        late_version=version,
        refused=refused.outcome,
        refused_after=refused_after,
    )


def ask_one_replica(bench: Bench, name: str, expected: Mapping[str, tuple[int, ...]]) -> tuple[Agreement, str]:
    """Ask all prompts, and compare the answers that one replica gave; with the version that it said."""
    answers = [
        (answer, prompt)
        for answer, prompt in zip(bench.asker.ask_all(bench.prompts), bench.prompts, strict=True)
        if answer.replica == name
    ]
    versions = sorted({answer.version for answer, _ in answers})
    agreement = compare([answer for answer, _ in answers], expected, [prompt for _, prompt in answers])
    return agreement, ", ".join(versions)
