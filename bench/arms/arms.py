"""The two arms: engines started here, or endpoints that already run somewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from laguna_serve.serving.client.completions import Client, find_model_name, find_root, list_models, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.sampling import RequestFields
from laguna_serve.serving.engine import Engine, EngineConfig, EngineError
from laguna_serve.serving.engine.figures import EngineFigures, read_figures
from laguna_serve.serving.kit.environment import count_as_own
from laguna_serve.serving.machine.device import find_device, find_vllm
from laguna_serve.serving.machine.memory import EngineMemory, process_memory
from laguna_serve.serving.planning.launch import check_launches, find_longest

BASELINE = "baseline"
CANDIDATE = "candidate"
ARMS = (BASELINE, CANDIDATE)
# The second engine may be this much larger than the first (a drafter, larger graphs).
ROOM_FACTOR = 1.3
# What an endpoint that already runs may take to say what it serves.
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """An arm before it runs: either `config` (an engine to start) or `url` (one that runs). `label` is for people."""

    name: str
    label: str
    config: EngineConfig | None = None
    url: str | None = None
    model_name: str | None = None


# A dying engine is seen dead a moment after its connections broke.
DEATH_S = 2.0


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm that answers requests. `model_name` None: ask the endpoint."""

    spec: ArmSpec
    base_url: str
    model_name: str | None
    engine: Engine | None = None

    @property
    def name(self) -> str:
        """The arm's name in results, "baseline" or "candidate"."""
        return self.spec.name

    @property
    def command(self) -> list[str] | None:
        """The engine's command line, to be repeated elsewhere; None for an endpoint that was not started here."""
        return ["python", *self.engine.command[1:]] if self.engine is not None else None

    async def connect(
        self,
        session: aiohttp.ClientSession,
        max_tokens: int,
        sampling: RequestFields | None = None,
        make: type[Client] = Client,
    ) -> Client:
        """Make a client of the arm, under the model name that is served there."""
        model_name = self.model_name or await find_model_name(session, self.base_url)
        return make(session, self.base_url, model_name, max_tokens, sampling)

    def check(self) -> None:
        """Raise EngineError, with the cause from its log, if an engine started here has died."""
        if self.engine is not None:
            self.engine.check()

    async def look_for_death(self) -> None:
        """Raise as `check` if an engine started here is seen dead within DEATH_S: its connections break before."""
        for _ in range(int(DEATH_S / 0.1) if self.engine is not None else 0):
            self.check()
            await asyncio.sleep(0.1)
        self.check()

    def read_memory(self) -> EngineMemory | None:
        """Memory of the engine's processes now; None where there are none, or for an endpoint started elsewhere."""
        memory = process_memory(self.engine.pids()) if self.engine is not None else None
        return memory if memory is not None and memory.processes else None

    def read_figures(self) -> EngineFigures | None:
        """Read what an engine started here says of its own memory and dtype; None for an endpoint."""
        return read_figures(self.engine.log_path) if self.engine is not None else None


@contextlib.contextmanager
def open_arm(spec: ArmSpec, out: Path, announce: Callable[[str], None]) -> Iterator[Arm]:
    """Start the arm's engine (or take its endpoint as it is); the engine is gone when the block ends.

    Raises:
        EngineError: the engine did not start; the message quotes its log.
    """
    if spec.config is None:
        assert spec.url is not None
        count_as_own(spec.url)
        yield Arm(spec, find_root(spec.url), spec.model_name)
        return
    announce(f"starting the {spec.name}: {spec.label}")
    log_path = out / f"{spec.name}.log"
    with Engine(spec.config, log_path=log_path, announce=lambda line: announce(f"  {spec.name:<9} {line}")) as engine:
        yield Arm(spec, engine.base_url, engine.model_name, engine)


def check_specs(specs: Iterable[ArmSpec], tokens: int) -> None:
    """Refuse what can be refused before the first engine starts.

    That is checkpoints, drafters and γ, weights, memory, vLLM's own flags, and answers of so many `tokens` where an
    engine's longest sequence has no room for them. Endpoints that already run are asked what they serve; more is not
    known of them.

    Raises:
        EngineError: the first engine that could not be started.
        EndpointError: an endpoint does not answer, or serves no such model.
    """
    specs = list(specs)
    configs = [spec.config for spec in specs if spec.config is not None]
    for config in configs:
        check_answers(config, tokens)
    check_launches(configs)
    if running := [spec for spec in specs if spec.url is not None]:
        asyncio.run(_check_endpoints(running))


def check_answers(config: EngineConfig, tokens: int) -> None:
    """Refuse answers that no prompt leaves room for; of masked diffusion the canvas is looked at.

    Raises:
        EngineError: the engine's longest sequence has no room for them.
    """
    length = find_longest(config)
    if length is not None and tokens >= length:
        expected = f"fewer than the {length} tokens that {config.model} takes, prompt included"
        raise EngineError(f"tokens of an answer: expected {expected}, got {tokens}; ask for fewer")


async def _check_endpoints(specs: Sequence[ArmSpec]) -> None:
    async with open_session() as session:
        for spec in specs:
            assert spec.url is not None
            try:
                served = await asyncio.wait_for(list_models(session, spec.url), ANSWER_S)
            except TimeoutError:
                expected = f"an answer within {ANSWER_S:.0f} s, got none; is the engine up?"
                raise EndpointError(f"{spec.url}: expected {expected}") from None
            if spec.model_name is not None and spec.model_name not in served:
                expected = f"a server of {spec.model_name!r}, got one of {', '.join(map(repr, served))}"
                raise EndpointError(f"{spec.url}: expected {expected}; name that with --model")


def has_room_beside(arm: Arm) -> bool:
    """Whether another engine like `arm` fits into the memory that is free now. Endpoints by URL run already."""
    memory, device = arm.read_memory(), find_device(find_vllm())
    if memory is None or device is None:
        return True
    used = memory.gpu_bytes if device.kind == "gpu" and memory.gpu_bytes else memory.pss_bytes
    return bool(device.free_bytes >= ROOM_FACTOR * used)
