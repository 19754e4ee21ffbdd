"""New weights from a trainer's own process, over the group that it forms with the workers of all engines.

The trainer is rank 0 of that group and speaks to one vLLM (its client has no notion of several): here are the same
steps for all engines of a model. Engines take part at once and not in turn, as each waits in the group for the others.
Requests are held from the start to the finish; an engine that fails is fenced off, and the others go on without it.
Checked against vLLM 0.32 and the client of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.update import RefusedError, StepError
from laguna_serve.serving.gateway.engines.weight_policy import number_of
from laguna_serve.serving.gateway.engines.weights import RESET, RESET_ALL, START, WeightGroup
from laguna_serve.serving.kit.results import JsonObject

INFO, WORLD = "/server_info", "/get_world_size"
# vLLM's backend for a trainer in another process; it needs CUDA on both sides.
BACKEND = "nccl"


class Transfer:
    """The updates that a trainer makes of a model's weights, one after the other."""

    def __init__(self, group: WeightGroup) -> None:
        self.group = group
        self._members: Sequence[Engine] = ()  # of the trainer's process group
        self._left: list[Engine] = []  # that the update under way has reached so far
        self._holds = False  # requests wait because of it

    async def describe(self) -> JsonObject:
        """Describe the first engine (vLLM's configuration), without a transfer that is not the trainer's on all.

        Raises StepError: an engine does not answer.
        """
        found = await self._ask_configs()
        first = dict(found[self.group.pool.engines[0]])
        if any(find_backend(config) != BACKEND for config in found.values()):
            first["weight_transfer_config"] = None
        return first

    async def count_workers(self) -> int:
        """Count the workers of all engines. Raises StepError: an engine does not answer."""
        return sum((await self._ask_sizes()).values())

    async def join(self, init_info: Mapping[str, object]) -> None:
        """Let all engines join the trainer's group, each at ranks of its own behind those of the one before.

        Raises:
            RefusedError: an engine has another backend, or the group has not as many places as there are workers.
            StepError: an engine does not answer, or could not join.
        """
        for engine, config in (await self._ask_configs()).items():
            if (backend := find_backend(config)) != BACKEND:
                raise RefusedError(
                    f"init_weight_transfer_engine: expected engines with the backend {BACKEND!r} "
                    f"(--weight-transfer-config, on CUDA devices alone), got {backend!r} of {engine.name}; "
                    "start them with it, or write a folder and send it to /admin/update_weights"
                )
        sizes = await self._ask_sizes()
        first, places = init_info.get("rank_offset"), init_info.get("world_size")
        if type(first) is not int or type(places) is not int or places != first + sum(sizes.values()):
            raise RefusedError(
                f"init_weight_transfer_engine: expected a world_size of rank_offset + {sum(sizes.values())} workers, "
                f"got world_size {places!r} and rank_offset {first!r}; ask /get_world_size again"
            )
        self._members = ()
        infos = dict[Engine, Mapping[str, object]]()
        for engine, size in sizes.items():
            infos[engine] = {**init_info, "rank_offset": first}
            first += size
        await self.group.call_each(
            "/init_weight_transfer_engine", {engine: {"init_info": info} for engine, info in infos.items()}
        )
        self._members = tuple(infos)

    async def start(self) -> None:
        """Hold requests, and begin an update on every engine; one that was left off is ended before.

        Raises:
            RefusedError: the engines have not joined the trainer's group, or others have come since.
            StepError: none could begin; all are fenced off, or none could be paused, and nothing has changed.
        """
        group, engines = self.group, self.group.pool.engines
        if not self._members or set(self._members) != set(engines):
            raise RefusedError(
                "start_weight_update: expected the engines that are there to have joined the trainer's group, got "
                "others or none; call init_weight_transfer_engine first"
            )
        if not group.pool.paused:
            await group.pause("keep")
            self._holds = True
        self._left = list(engines)
        await group.close(engines)
        group.note_changed(engines, "update")
        group.opened |= set(engines)
        await self._step(START["update"])

    async def update(self, update_info: object) -> None:
        """Tell engines of tensors that come. Raises RefusedError: nothing was started; StepError: all failed."""
        await self._step("/update_weights", {"update_info": update_info})

    async def finish(self, weight_version: str | None) -> str:
        """End the update: engines that went along have the version, the next one where it has no name; requests go on.

        Returns the version.

        Raises:
            RefusedError: nothing was started.
            StepError: no engine has it; all are fenced off.
        """
        group, version = self.group, weight_version or name_next(self.group.pool.newest)
        await self._step("/finish_weight_update", {"weight_version": version})
        group.opened.difference_update(self._left)
        await self._step(RESET, params=RESET_ALL)
        try:
            await group.verify(self._left, version)
        except StepError as error:
            await self._drop(error)
        group.settle(("update", "weight_version"), version, None, self._left)
        await self._end()
        return version

    async def _step(
        self, path: str, body: Mapping[str, object] | None = None, params: Mapping[str, str] | None = None
    ) -> None:
        if not self._left:
            raise RefusedError(f"{path.strip('/')}: expected an update under way, got none; call start_weight_update")
        try:
            await self.group.call(path, self._left, body, params)
        except StepError as error:
            await self._drop(error)

    async def _drop(self, error: StepError) -> None:
        """Go on without the engines that failed. Raises the error where none is left: requests go on then."""
        self._left = [engine for engine in self._left if engine not in error.errors]
        for engine, reason in error.errors.items():
            engine.fence(f"an update of its weights failed: {reason}")
        if not self._left:
            await self._end()
            raise error

    async def _end(self) -> None:
        self._left = []
        if self._holds:
            self._holds = False
            await self.group.resume()

    async def _ask_configs(self) -> dict[Engine, JsonObject]:
        engines = self.group.pool.engines
        found = await self.group.call(INFO, engines, params={"config_format": "json"}, method="GET")
        return {engine: answer["vllm_config"] for engine, answer in found.items()}

    async def _ask_sizes(self) -> dict[Engine, int]:
        found = await self.group.call(WORLD, self.group.pool.engines, method="GET")
        return {engine: answer["world_size"] for engine, answer in found.items()}


def find_backend(config: JsonObject) -> str | None:
    """Find the backend of an engine's weight transfer; None where it has none."""
    return (config.get("weight_transfer_config") or {}).get("backend")


def name_next(version: bytes) -> str:
    """Name the version behind one: trl-8 comes behind step-7, trl-1 behind what has no number."""
    return f"trl-{(number_of(version) or 0) + 1}"
