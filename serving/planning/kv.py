"""What sequences take of vLLM's KV cache, and how long they can become in the memory that there is.

vLLM's cache is made of blocks of tokens. Layers that keep the whole context, and those that keep a window of it, are
put into groups of equally many layers, and a block belongs to one group; a sequence has blocks for its whole length in
every group of the first kind and for a window's worth in every group of the second. A drafter's layers keep the whole
context even where they slide: vLLM writes their keys and values for it in one go.

Read in vLLM 0.32.0 (v1/core/kv_cache_utils.py, v1/kv_cache_interface.py), and compared with it in
tests/serving/planning/test_planning.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.checkpoint.target import Target
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.budget import GPU_CONTEXT_BYTES, MAX_GPU_SHARE

GPU_BLOCK, CPU_BLOCK = 16, 128
# vLLM's max_num_batched_tokens for a server: by memory, an A100 having less throughput than its memory.
BATCHED_TOKENS = ((160 * GIB, 16384), (70 * GIB, 8192))
FEWEST_BATCHED_TOKENS = 2048
# Groups of unequal kinds are made equal by padding where that costs less than half.
MAX_PADDING = 1.5


# CUDA graphs of a layer over all batch sizes that are captured, roughly; vLLM measures them when it starts.
GRAPH_BYTES_PER_LAYER = 8 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """What a device's memory goes to, in bytes; `kv` is what is left, 0 where nothing is."""

    weights: int
    activations: int
    graphs: int
    context: int
    kv: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How a model's layers share the KV cache.

    Attributes:
        full, sliding: groups of layers of either kind.
        group_layers: layers in a group.
        layer_bytes: of one token in one layer.
        block: tokens in a block.
        window: tokens that a sliding layer sees.
        in_flight: tokens of all sequences that are being computed, whose blocks are held whatever the window.
    """

    full: int
    sliding: int
    group_layers: int
    layer_bytes: int
    block: int
    window: int
    in_flight: int

    def sequence_bytes(self, tokens: int) -> int:
        """Return what vLLM wants to be free for one sequence of that length."""
        return self.total_bytes(tokens, 1)

    def total_bytes(self, tokens: int, sequences: int) -> int:
        """Total what so many sequences of that length take: a window each in sliding groups, and what is in flight."""
        # One block more than a window takes, as it begins anywhere in a block.
        held = self.full * sequences * ceil(tokens / self.block)
        if sequences == 1:
            windows = ceil(min(tokens, self.window - 1 + self.in_flight) / self.block) + 1
        else:
            windows = sequences * (ceil(min(tokens, self.window - 1) / self.block) + 1)
            windows += ceil(min(sequences * tokens, self.in_flight) / self.block)
        held += self.sliding * windows
        return held * self.block * self.group_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """What one more token takes of a long sequence."""
        return self.full * self.group_layers * self.layer_bytes

    def longest(self, available: int, sequences: int, limit: int) -> int:
        """Return the longest context, up to `limit`, that so many sequences can have at once; 0 for none."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.total_bytes(middle, sequences) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    def most_sequences(self, available: int, tokens: int) -> int:
        """How many sequences of that length fit at once."""
        count = available // max(1, self.total_bytes(tokens, 2) - self.total_bytes(tokens, 1)) + 1
        while count and self.total_bytes(tokens, count) > available:
            count -= 1
        return count


def share_gpu(
    target: Target,
    device: Device,
    weights: int,
    *,
    batched_tokens: int,
    sequences: int,
    rows: int = 1,
    graphed_layers: int,
    share: float = MAX_GPU_SHARE,
    given: int | None = None,
    value_bytes: int = 2,
) -> Memory:
    """Share a GPU's memory out, by estimates; `given` is the KV cache that was asked for.

    A value of an activation has `value_bytes`.
    """
    activations = estimate_activations(
        target, batched_tokens=batched_tokens, sequences=sequences, rows=rows, value_bytes=value_bytes
    )
    graphs = GRAPH_BYTES_PER_LAYER * graphed_layers
    left = int(device.total_bytes * share) - weights - activations - graphs - GPU_CONTEXT_BYTES
    return Memory(weights, activations, graphs, GPU_CONTEXT_BYTES, given or max(0, left))


def choose_batched_tokens(device: Device) -> int:
    """vLLM's own max_num_batched_tokens for a server on this device."""
    if device.kind == "gpu":
        for least, tokens in BATCHED_TOKENS:
            if device.total_bytes >= least and (least > BATCHED_TOKENS[1][0] or "a100" not in device.name.lower()):
                return tokens
    return FEWEST_BATCHED_TOKENS


def plan_layout(
    target: Target, drafter: Drafter | None, device: Device, *, value_bytes: int, batched_tokens: int, ranks: int = 1
) -> KvLayout:
    """Plan the layout on a device; `ranks` devices share the heads."""
    heads = ceil(target.num_kv_heads / ranks)
    layer_bytes = 2 * heads * target.head_dim * value_bytes
    full = target.full_layers
    if drafter is not None:
        # Their pages are made as large as the target's: a drafter with smaller ones takes as much.
        own = 2 * ceil(drafter.attention.kv_heads / ranks) * drafter.attention.head_dim * value_bytes
        full += ceil(drafter.num_layers * max(1.0, own / layer_bytes))
    sliding = target.sliding_layers
    block = GPU_BLOCK if device.kind == "gpu" else CPU_BLOCK
    # A step that is already scheduled holds its blocks, too, where scheduling runs ahead.
    in_flight = batched_tokens * (2 if device.kind == "gpu" else 1)
    size = _choose_group_size(full, sliding)
    return KvLayout(
        full=ceil(full / size),
        sliding=ceil(sliding / size),
        group_layers=size,
        layer_bytes=layer_bytes,
        block=block,
        window=target.sliding_window or 1,
        in_flight=in_flight,
    )


def _choose_group_size(full: int, sliding: int) -> int:
    counts = [count for count in (full, sliding) if count]
    return max(counts) if max(counts) < MAX_PADDING * min(counts) else min(counts)


def estimate_activations(target: Target, *, batched_tokens: int, sequences: int, rows: int, value_bytes: int) -> int:
    """Estimate what a step of the largest batch needs besides the weights: one layer's rows, and logits in fp32.

    An estimate: vLLM measures it when it starts. `rows` are those of a sequence whose logits are taken, γ + 1.
    """
    width = max(target.heads) * target.head_dim + 2 * target.num_kv_heads * target.head_dim
    experts = target.experts_per_token * (2 * target.expert_size + target.hidden_size) if not target.dense else 0
    layer = 4 * target.hidden_size + 2 * width + max(experts, 3 * target.intermediate_size if target.dense else 0)
    logits = 2 * 4 * sequences * rows * target.vocab_size
    return batched_tokens * layer * value_bytes + logits
