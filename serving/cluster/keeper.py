"""Which weights serve now, on all replicas of a model or on none: one process, whose truth is a file.

An update is one broadcast after the other, each to every replica that has joined: who is there, hold, load, release.
Where one of them cannot load, all that were touched load what they had before. A replica that does not answer is struck
off: at its next health check it hears that it is not known, says that it is not well, and Ray replaces it. So is every
one that this process does not know after it was itself started again in the middle of an update.  Weights that no
replica has taken never become those of now: it might be that none can.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState, Reply, UpdateReport, Version
from laguna_serve.serving.cluster.replica import as_new
from laguna_serve.serving.kit.files import write_json

SCHEMA = "laguna_serve.cluster_weights/1"
NOBODY = {"replicas": "expected one that takes the weights, got none that answers; ask again when there is one"}
# A replica that is not there, and has not asked whether it may go on for so long, has ended: it asks every two seconds.
# One that has just joined is not listed by Ray yet.  Requests are not held meanwhile.
SILENT_S = 10.0
# For one that was there to answer in the middle of an update, when requests are held.
MISSING_S = 10.0
RETRY_S = 0.25
STEP_TIMEOUT_S = 900.0


class WeightKeeper:
    """Keeps the version of every model that takes new weights. `replicas` are Ray's handles of the models' replicas."""

    def __init__(self, file: str, replicas: Mapping[str, DeploymentHandle]) -> None:
        self._file, self._replicas = Path(file), dict(replicas)
        self._versions = {name: Version() for name in replicas} | read_versions(self._file)
        # Of every replica that has joined, when it was last heard.
        self._members: dict[str, dict[str, float]] = {name: {} for name in replicas}
        # Struck off, and never taken in again: `release` reaches every replica that Ray lists, these among them.
        self._struck = set[str]()
        self._locks = {name: asyncio.Lock() for name in replicas}

    async def find(self, model: str) -> Version:
        """Find the version of now; while an update is under way this waits for its end."""
        async with self._locks[model]:
            return self._versions[model]

    async def join(self, model: str, replica: str, epoch: int) -> bool:
        """Take note of a replica that has an epoch's weights; False where there are newer ones by now."""
        async with self._locks[model]:
            if epoch != self._versions[model].epoch:
                return False
            self._members[model][replica] = time.monotonic()
            return True

    async def leave(self, model: str, replica: str) -> None:
        """Take note that a replica ends."""
        self._members[model].pop(replica, None)

    async def confirm(self, model: str, replica: str, epoch: int | None) -> bool:
        """Say whether a replica may go on: its weights are those of now, or an update is under way.

        One that joined a process before this one is taken in again; one that was struck off is not.
        """
        if self._locks[model].locked():
            return True
        if epoch != self._versions[model].epoch or replica in self._struck:
            self._members[model].pop(replica, None)
            return False
        self._members[model][replica] = time.monotonic()
        return True

    async def list_members(self, model: str) -> list[str]:
        """List the replicas that have the weights of now."""
        return sorted(self._members[model])

    async def update(self, model: str, new: NewWeights, mode: str = "keep") -> UpdateReport:
        """Give all replicas new weights, or none.

        `mode` is vLLM's: what becomes of requests under way ("keep" pauses them, "wait" lets them end, "abort").

        Raises:
            ValueError: the model takes none, or there are none.
        """
        if model not in self._replicas:
            raise ValueError(f"model {model}: expected one with weight_updates, {', '.join(self._replicas)}")
        if not (new.update or new.draft_update):
            raise ValueError("update: expected bodies of update or draft_update, got none")
        async with self._locks[model]:
            return await self._update(model, new, mode)

    async def _update(self, model: str, new: NewWeights, mode: str) -> UpdateReport:
        await self._call_roll(model)
        started, before = time.monotonic(), self._versions[model]
        took_part = len(self._members[model])

        def report(outcome: str, errors: Mapping[str, str]) -> UpdateReport:
            now, seconds = self._versions[model], round(time.monotonic() - started, 3)
            return UpdateReport(outcome, model, now.weight_version, now.draft_version, took_part, seconds, dict(errors))

        if not took_part:
            return report("unchanged", NOBODY)
        if errors := await self._call(model, "hold", mode):
            await self._call(model, "release", before.epoch)
            return report("unchanged", errors)
        after = before.follow(new)
        given = NewWeights(
            new.update,
            after.weight_version if new.update else None,
            new.draft_update,
            after.draft_version if new.draft_update else None,
        )
        errors = await self._call(model, "load", given)
        if not self._members[model]:
            # Whether they can be loaded is not known, and those struck off may have either: none may go on.
            self._settle(model, replace(before, epoch=after.epoch))
            return report("reduced", NOBODY)
        if not errors:
            self._settle(model, after)
            lost = await self._call(model, "release", after.epoch)
            self._strike_off(model, lost)
            return report("updated", lost)
        whole = as_new(before)
        back = NewWeights(
            whole.update if new.update else (),
            before.weight_version,
            (whole.draft_update or ({},)) if new.draft_update else (),
            before.draft_version,
        )
        failed = await self._call(model, "load", back)
        self._strike_off(model, failed)
        lost = await self._call(model, "release", before.epoch)
        self._strike_off(model, lost)
        return report("reduced" if failed or lost else "rolled_back", errors | failed | lost)

    def _settle(self, model: str, version: Version) -> None:
        self._versions[model] = version
        write_versions(self._file, self._versions)

    async def _call(self, model: str, method: str, argument: object) -> dict[str, str]:
        """Have every replica that has joined do something, once; what went wrong, by replica.

        One that does not answer in time is struck off, and is no error: it has died, or will be replaced.
        """
        operation = uuid.uuid4().hex
        heard: dict[str, Reply] = {}
        deadline = time.monotonic() + MISSING_S
        while self._members[model].keys() - heard.keys():
            answers = await self._ask(model, method, operation, argument)
            heard |= {answer.replica: answer for answer in answers if isinstance(answer, Reply)}
            if not (missing := self._members[model].keys() - heard.keys()):
                break
            if time.monotonic() > deadline:
                self._strike_off(model, missing)
                break
            await asyncio.sleep(RETRY_S)
        return {name: r.error for name, r in heard.items() if r.error is not None and name in self._members[model]}

    async def _call_roll(self, model: str) -> None:
        """Wait until every replica that has joined is there, or is known to have ended."""
        while self._members[model]:
            there = {state.replica for state in await self._ask(model, "describe") if isinstance(state, ReplicaState)}
            missing = {name: heard_s for name, heard_s in self._members[model].items() if name not in there}
            if not missing:
                return
            silent_s = time.monotonic() - SILENT_S
            self._strike_off(model, {name for name, heard_s in missing.items() if heard_s < silent_s})
            await asyncio.sleep(RETRY_S)

    async def _ask(self, model: str, method: str, *arguments: object) -> Sequence[object]:
        """Ask every replica that Ray lists; answers, and exceptions in their place."""
        response = self._replicas[model].broadcast(method, *arguments)
        try:
            answers: list[object] = await response.results_async(timeout_s=STEP_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return ()  # there may be no replica at all
        return answers

    def _strike_off(self, model: str, replicas: Iterable[str]) -> None:
        for name in replicas:
            self._members[model].pop(name, None)
            self._struck.add(name)


def read_versions(file: Path) -> dict[str, Version]:
    """Read the versions of a file; none where there is no file yet. Raises ValueError: it is not ours."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if read.get("schema") != SCHEMA:
        raise ValueError(f"weights.file {file}: expected {SCHEMA}, got {read.get('schema')!r}; name another file")
    return {name: Version(**version) for name, version in read["models"].items()}


def write_versions(file: Path, versions: Mapping[str, Version]) -> None:
    """Write them whole. Raises WriteError."""
    write_json(file, {"schema": SCHEMA, "models": {name: asdict(version) for name, version in versions.items()}})
