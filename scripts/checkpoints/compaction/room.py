"""What fits beside a model's weights on a GPU of 48 and of 80 GB, by the planner's estimates."""

from __future__ import annotations

import msgspec

from laguna_serve.serving.checkpoint import Target
from laguna_serve.serving.checkpoint.parameters import estimate_held
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.devices import plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.kv import choose_batched_tokens, plan_layout, share_gpu
from laguna_serve.serving.planning.support import kv_value_bytes

GPUS = ("l40s", "h100-80gb")
CONTEXT = 131_072


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU has room for, without a drafter.

    Attributes:
        kv_bytes: for the KV cache; 0 where the weights do not fit.
        context: tokens of a sequence; as many as the model has, at most CONTEXT.
        sequences: of that length, at once.
        longest: one sequence alone.
    """

    device: str
    kv_bytes: int
    context: int
    sequences: int
    longest: int


def find_room(target: Target) -> tuple[Room, ...]:
    """Find what there is beside the target's weights on each of the GPUS."""
    found = []
    for name in GPUS:
        device = plan_for(name)
        batched = choose_batched_tokens(device)
        memory = share_gpu(
            target,
            device,
            estimate_held(target).total,
            batched_tokens=batched,
            sequences=EngineConfig(target.name).max_num_seqs,
            graphed_layers=target.num_layers,
        )
        value_bytes = kv_value_bytes(target, device, "auto")
        layout = plan_layout(target, None, device, value_bytes=value_bytes, batched_tokens=batched)
        context = min(CONTEXT, target.max_model_len)
        found.append(
            Room(
                device=device.name,
                kv_bytes=memory.kv,
                context=context,
                sequences=layout.most_sequences(memory.kv, context),
                longest=layout.longest(memory.kv, 1, target.max_model_len),
            )
        )
    return tuple(found)


def format_room(room: Room) -> str:
    """Write a line for people."""
    if not room.longest:
        return "too small"
    fits = f"{room.sequences:,} × {room.context:,} tokens" if room.sequences else f"{room.longest:,} tokens, alone"
    return f"{room.kv_bytes / GIB:.1f} GiB for the KV cache: {fits}"
