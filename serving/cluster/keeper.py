"""Which weights serve now, on all replicas of a model or on none: one process, whose truth is a file.

An update is one broadcast after the other, each to every replica that has joined: who is there, hold, load, release.
Where one of them cannot load, or shows other digests than the others where they are asked for, all that were touched
load what they had before. A replica that does not answer is struck off: at its next health check it hears that it is
not known, says that it is not well, and Ray replaces it, also where this process was started again meanwhile: the file
names it. So is every one that this process does not know after it was itself started again in the middle of an update.
Weights that no replica has taken never become those of now: it might
be that none can.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState, Reply, Told, UpdateReport, Version
from laguna_serve.serving.cluster.replica import as_new
from laguna_serve.serving.cluster.versions_file import read_struck, read_versions, write_versions
from laguna_serve.serving.gateway.engines import digests
from laguna_serve.serving.kit.files import WriteError

NOBODY = {"replicas": "expected one that takes the weights, got none that answers; ask again when there is one"}
# A replica that is not there, and has not asked whether it may go on for so long, has ended: it asks every two seconds.
# One that has just joined is not listed by Ray yet. Requests are not held meanwhile.
SILENT_S = 10.0
# For Ray to list the replicas that serve to a process that has just begun.
LISTED_S = 2.0
# For one that was there to answer in the middle of an update, when requests are held.
MISSING_S = 10.0
RETRY_S = 0.25
STEP_TIMEOUT_S = 900.0
DOUBT = "expected most replicas to have the same weights again, got different ones"
logger = logging.getLogger("ray.serve")


class OtherWeightsError(Exception):
    """A new replica shows other digests than those that have the weights of now."""


@dataclass(frozen=True)
class Member:
    """A replica that has joined: when it was last heard, and what it said of its weights, if that was asked for."""

    heard_s: float
    told: Told | None


class WeightKeeper:
    """Keeps the version of every model that takes new weights. `replicas` are Ray's handles of the models' replicas."""

    def __init__(self, file: str, replicas: Mapping[str, DeploymentHandle]) -> None:
        self._file, self._replicas = Path(file), dict(replicas)
        self._versions = {name: Version() for name in replicas} | read_versions(self._file)
        self._members: dict[str, dict[str, Member]] = {name: {} for name in replicas}
        # Struck off, and never taken in again: `release` reaches every replica that Ray lists, these among them. In
        # the order in which they were.
        self._struck = dict.fromkeys(read_struck(self._file))
        self._locks = {name: asyncio.Lock() for name in replicas}

    async def find(self, model: str) -> Version:
        """Find the version of now; while an update is under way this waits for its end."""
        async with self._locks[model]:
            return self._versions[model]

    async def join(self, model: str, replica: str, epoch: int, told: Told | None = None) -> bool:
        """Take note of a replica that has an epoch's weights; False where there are newer ones by now.

        Raises:
            OtherWeightsError: `told` are not the digests of those that were started alike and have joined.
        """
        async with self._locks[model]:
            if epoch != self._versions[model].epoch:
                return False
            if told is not None and told.ranks and not list_alike(told, self._list_told(model)):
                await self._hear(model)
            if told is not None and (fault := find_fault(replica, told, self._list_told(model))):
                logger.warning("replica %s: digests: %s", replica, fault)
                raise OtherWeightsError(f"replica {replica}: digests: {fault}")
            self._members[model][replica] = Member(time.monotonic(), told)
            return True

    def _list_told(self, model: str) -> dict[str, Told]:
        return {name: member.told for name, member in self._members[model].items() if member.told is not None}

    async def _hear(self, model: str) -> None:
        """Hear what the replicas that serve say of their weights, as they said to a process before this one."""
        epoch, deadline = self._versions[model].epoch, time.monotonic() + LISTED_S
        while not (answers := await self._ask(model, "describe")) and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_S)
        now_s = time.monotonic()
        for state in answers:
            if isinstance(state, ReplicaState) and state.epoch == epoch and state.replica not in self._struck:
                self._members[model][state.replica] = Member(now_s, state.told)

    async def leave(self, model: str, replica: str) -> None:
        """Take note that a replica ends."""
        self._members[model].pop(replica, None)

    async def confirm(self, model: str, replica: str, epoch: int | None, told: Told | None = None) -> bool:
        """Say whether a replica may go on: its weights are those of now, or an update is under way.

        One that joined a process before this one is taken in again; one that was struck off is not.
        """
        if self._locks[model].locked():
            return True
        if epoch != self._versions[model].epoch or replica in self._struck:
            self._members[model].pop(replica, None)
            return False
        self._members[model][replica] = Member(time.monotonic(), told)
        return True

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
            new.digests,
        )
        replies = await self._gather(model, "load", given)
        errors = list_errors(replies) or compare(replies)
        if not self._members[model]:
            # Whether they can be loaded is not known, and those struck off may have either: none may go on.
            self._versions[model] = replace(before, epoch=after.epoch)
            return report("reduced", NOBODY | self._settle(model, self._versions[model]))
        errors = errors or self._settle(model, after)
        if not errors:
            self._note_told(model, replies)
            lost = await self._call(model, "release", after.epoch)
            self._strike_off(model, lost)
            return report("updated", list_silent(replies) | lost)
        whole = as_new(before)
        back = NewWeights(
            whole.update if new.update else (),
            before.weight_version,
            (whole.draft_update or ({},)) if new.draft_update else (),
            before.draft_version,
            new.digests or before.digests,
        )
        replies = await self._gather(model, "load", back)
        failed = list_errors(replies) | compare(replies, doubt=True)
        self._strike_off(model, failed)
        self._note_told(model, replies)
        lost = await self._call(model, "release", before.epoch)
        self._strike_off(model, lost)
        return report("reduced" if failed or lost else "rolled_back", errors | failed | lost)

    def _settle(self, model: str, version: Version) -> dict[str, str]:
        """Note a version, in the file first: what is not there is not served. What went wrong with that."""
        try:
            write_versions(self._file, self._versions | {model: version}, self._struck)
        except WriteError as error:
            return {"weights.file": str(error)}
        self._versions[model] = version
        return {}

    def _note_told(self, model: str, replies: Iterable[Reply]) -> None:
        now_s = time.monotonic()
        self._members[model] |= {r.replica: Member(now_s, r.told) for r in replies if r.replica in self._members[model]}

    async def _call(self, model: str, method: str, argument: object) -> dict[str, str]:
        """Call every replica that has joined, once; returns what went wrong, by replica."""
        return list_errors(await self._gather(model, method, argument))

    async def _gather(self, model: str, method: str, argument: object) -> list[Reply]:
        """Call every replica that has joined, once; returns their answers.

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
        return [heard[name] for name in sorted(heard) if name in self._members[model]]

    async def _call_roll(self, model: str) -> None:
        """Wait until every replica that has joined is there, or is known to have ended."""
        while self._members[model]:
            there = {state.replica for state in await self._ask(model, "describe") if isinstance(state, ReplicaState)}
            missing = {name: member for name, member in self._members[model].items() if name not in there}
            if not missing:
                return
            silent_s = time.monotonic() - SILENT_S
            self._strike_off(model, {name for name, member in missing.items() if member.heard_s < silent_s})
            await asyncio.sleep(RETRY_S)

    async def _ask(self, model: str, method: str, *arguments: object) -> Sequence[object]:
        """Ask every replica that Ray lists; answers, and exceptions in their place."""
        response = self._replicas[model].broadcast(method, *arguments)
        try:
            answers: list[object] = await response.results_async(timeout_s=STEP_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return ()  # there may be no replica at all
        return answers

    def _strike_off(self, model: str, replicas: Collection[str]) -> None:
        """Strike replicas off, for a process after this one too: with their weights' epoch they would pass there."""
        for name in replicas:
            self._members[model].pop(name, None)
            self._struck[name] = None
        if replicas:
            try:
                write_versions(self._file, self._versions, self._struck)
            except WriteError as error:
                logger.warning("%s; a keeper that is started again does not know whom this one has struck off", error)


def list_errors(replies: Iterable[Reply]) -> dict[str, str]:
    """List what went wrong, by replica."""
    return {reply.replica: reply.error for reply in replies if reply.error is not None}


def list_silent(replies: Iterable[Reply]) -> dict[str, str]:
    """List the replicas that could not tell their digests, which are as good as those that were not asked."""
    silent = {reply.replica: reply.told.fault for reply in replies if reply.told is not None and reply.told.fault}
    return {name: f"digests: not compared, as it cannot tell: {fault}" for name, fault in silent.items()}


def compare(replies: Iterable[Reply], *, doubt: bool = False) -> dict[str, str]:
    """Find the replicas that show other digests than most that were started alike; what is wrong, in words.

    With `doubt` all that were started alike are wrong where no more than half of them agree.
    """
    alike = defaultdict[str, dict[str, Sequence[digests.Digests]]](dict)
    for reply in replies:
        if reply.told is not None and reply.told.ranks:
            alike[reply.told.engine][reply.replica] = reply.told.ranks
    wrong = dict[str, str]()
    for found in alike.values():
        differing = digests.find_differing(found, str)
        if doubt and differing and 2 * len(differing) >= len(found):
            differing = dict.fromkeys(found, DOUBT) | differing
        wrong |= {name: f"digests: {fault}" for name, fault in differing.items()}
    return wrong


def list_alike(told: Told, known: Mapping[str, Told]) -> dict[str, Sequence[digests.Digests]]:
    """List the digests of those whose engines were started in the same way."""
    return {name: one.ranks for name, one in known.items() if one.engine == told.engine and one.ranks}


def find_fault(replica: str, told: Told, known: Mapping[str, Told]) -> str | None:
    """Find what is wrong with a new replica's weights, beside the first known ones of an engine started alike."""
    alike = list_alike(told, known)
    if not alike or not told.ranks:
        return None
    first = min(alike)
    return digests.find_differing({first: alike[first], replica: told.ranks}, str).get(replica)
