"""In which order engines are measured: both up at once, round by round, or one at a time where both do not fit.

Decided before the first is started, from what the checkpoints' configurations say of weights, buffers and KV cache
(serving/planning). Where that cannot be told, as of a hub id that is not on this machine, what the baseline holds once
it is up decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from laguna_serve.bench.arms.arms import Arm, ArmSpec, has_room_beside
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.budget import ENGINE_BYTES, MAX_KV_SHARE, MIN_KV_BYTES
from laguna_serve.serving.planning.command import wanted_kv_bytes
from laguna_serve.serving.planning.launch import require_device
from laguna_serve.serving.planning.plan import EnginePlan, make_plan

AT_A_TIME = "one engine at a time, the baseline first and last"
# Of a GPU, for all engines together: buffers and graphs are estimates.
MAX_GPU_SHARE = 0.95
# Characters of a token, at the least: prompts are measured before there is a tokenizer.
CHARACTERS = 2
# What a chat template may add to a message.
TEMPLATE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Load:
    """What the KV cache of each engine has to hold at once: so many sequences of at most so many tokens."""

    tokens: int
    sequences: int

    @classmethod
    def of(cls, prompts: Sequence[Prompt], max_tokens: int, sequences: int) -> Load:
        """Make the load of prompts answered with `max_tokens` each."""
        longest = max((len(prompt.text.encode()) for prompt in prompts), default=0)
        added = TEMPLATE_TOKENS if any(prompt.chat is not None for prompt in prompts) else 0
        return cls(longest // CHARACTERS + added + max_tokens, sequences)


@dataclass(frozen=True, slots=True)
class Order:
    """`sequential`: one engine at a time. `kv_cache_gib`: for each engine, so that both fit; None: as configured.

    `settled`: the sizes are known, or the user has decided; else the first engine that is up shows whether there is
    room for another one.
    """

    sequential: bool
    settled: bool = True
    kv_cache_gib: float | None = None

    def allows(self, baseline: Arm, say: Callable[[str], None]) -> bool:
        """Whether another engine may be started beside this one; says so where it may not."""
        if self.settled or has_room_beside(baseline):
            return True
        say(f"not enough free memory for both engines at once: {AT_A_TIME}")
        return False

    def apply(self, spec: ArmSpec) -> ArmSpec:
        """Give an arm its share of the memory."""
        if spec.config is None or self.kv_cache_gib is None:
            return spec
        return replace(spec, config=replace(spec.config, kv_cache_gib=self.kv_cache_gib))


def choose_order(specs: Sequence[ArmSpec], asked: bool | None, load: Load, say: Callable[[str], None]) -> Order:
    """Choose the order for arms of which two at most are up at once.

    `asked`: what the user says of it, None for nothing.
    """
    configs = [spec.config for spec in specs if spec.config is not None]
    if asked or len(configs) < len(specs):
        if asked:
            say(AT_A_TIME)
        return Order(sequential=bool(asked))
    room = find_room(configs, require_device(), load)
    if room is None:
        return Order(sequential=False, settled=asked is False)
    if room.kv_bytes is None and asked is None:
        say(f"{room.why}: {AT_A_TIME}")
        return Order(sequential=True)
    return Order(sequential=False, kv_cache_gib=None if room.kv_bytes is None else room.kv_bytes / GIB)


@dataclass(frozen=True, slots=True)
class Room:
    """`kv_bytes`: what each of the engines may have for KV cache, None where they do not fit; `why` is for people."""

    why: str
    kv_bytes: int | None


def find_room(configs: Sequence[EngineConfig], device: Device, load: Load) -> Room | None:
    """Whether engines fit at once, with a KV cache for that load each; None where their sizes are not known."""
    try:
        plans = [make_plan(config, device) for config in configs]
    except CheckpointError:
        return None  # what cannot be read at all is refused with its reason where arms are checked
    if any(plan.memory is None or plan.layout is None for plan in plans):
        return None
    weights = sum(plan.memory.weights for plan in plans if plan.memory)
    buffers = sum(_count_buffers(plan) for plan in plans)
    needed = len(plans) * max(_find_kv(plan, load) for plan in plans)
    limit = int(min(device.free_bytes, device.total_bytes * (MAX_GPU_SHARE if device.kind == "gpu" else 1)))
    total = weights + buffers + needed
    parts = f"{_gib(weights)} weights, {_gib(buffers)} buffers, {_gib(needed)} KV cache"
    why = f"both engines at once need {_gib(total)} ({parts}), and {device.name} has {_gib(limit)} for them"
    if total > limit:
        return Room(why, None)
    given = [config.kv_cache_gib for config in configs]
    if all(gib is not None for gib in given):
        return Room(why, int((given[0] or 0) * GIB))
    rest = (limit - weights - buffers) // len(plans)
    wanted = max(wanted_kv_bytes(plan.config, plan.checkpoints) for plan in plans)
    return Room(why, max(needed // len(plans), min(wanted, int(rest * MAX_KV_SHARE))))


def _count_buffers(plan: EnginePlan) -> int:
    memory = plan.memory
    assert memory is not None
    if plan.device.kind == "cpu":
        return ENGINE_BYTES
    return memory.activations + memory.graphs + memory.context


def _find_kv(plan: EnginePlan, load: Load) -> int:
    if plan.config.kv_cache_gib is not None:
        return int(plan.config.kv_cache_gib * GIB)
    assert plan.layout is not None
    tokens = min(load.tokens + 1 + (plan.checkpoints.gamma or 0), plan.length or load.tokens)
    return max(MIN_KV_BYTES, plan.layout.total_bytes(tokens, load.sequences))


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
