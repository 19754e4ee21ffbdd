"""What an engine says of its own memory and dtype while it starts, read from its log.

On a GPU vLLM reserves a share of the card whatever the model needs, so that the memory of its processes says what was
reserved. What weights, KV cache, CUDA graphs and activations take, it says itself, once.

Sources (vLLM 0.26 to 0.33): v1/worker/gpu_worker.py, gpu_model_runner.py, cpu_worker.py, v1/core/kv_cache_utils.py,
v1/engine/core.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from laguna_serve.serving.machine.memory import GIB

# The lines stand at the beginning, before any request.
MAX_BYTES = 1 << 20
NUMBER = r"(?P<value>[\d.,]+)"
IN_GIB = {
    "weights_bytes": (rf"Model loading took {NUMBER} GiB",),
    "kv_cache_bytes": (
        rf"Available KV cache memory: {NUMBER} GiB",
        rf"reserved {NUMBER} GiB memory for KV Cache",
        rf"Explicitly set \({NUMBER}/[\d.]+\) GiB for KV cache",
    ),
    "graphs_bytes": (rf"Graph capturing finished in [\d.]+ secs?, took {NUMBER} GiB",),
    "peak_activation_bytes": (rf"{NUMBER} GiB for peak activation",),
}
FREED = re.compile(r"Sleep mode freed ([\d.,]+) GiB memory")
KV_TOKENS = re.compile(rf"KV cache size: {NUMBER} tokens")
DTYPE = re.compile(r"Initializing a V1 LLM engine .*?[ (]dtype=torch\.(\w+)")


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by what they are for; None where the engine did not say (a CPU's says less).

    Attributes:
        weights_bytes: of the target and its drafter.
        kv_cache_bytes: reserved for the KV cache; `kv_cache_tokens` fit into it.
        graphs_bytes: of captured CUDA graphs.
        peak_activation_bytes: beyond these, of the largest step.
        dtype: the model's, such as "bfloat16".
    """

    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    graphs_bytes: int | None = None
    peak_activation_bytes: int | None = None
    dtype: str | None = None


def read_figures(log: Path) -> EngineFigures:
    """Read what the engine that writes this log has said so far; nothing where there is no log."""
    try:
        with log.open("rb") as file:
            text = file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return EngineFigures()
    tokens, dtype = KV_TOKENS.search(text), DTYPE.search(text)
    return EngineFigures(
        **{name: _find_bytes(text, patterns) for name, patterns in IN_GIB.items()},
        kv_cache_tokens=int(tokens["value"].replace(",", "")) if tokens else None,
        dtype=dtype[1] if dtype else None,
    )


def read_freed(log: Path) -> int | None:
    """Read how many bytes the engine says to have freed when it was put to sleep last; None where it does not."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_BYTES))
            found = FREED.findall(file.read().decode(errors="replace"))
    except OSError:
        return None
    return round(float(found[-1].replace(",", "")) * GIB) if found else None


def _find_bytes(text: str, patterns: tuple[str, ...]) -> int | None:
    for pattern in patterns:
        if found := re.search(pattern, text):
            return round(float(found["value"].replace(",", "")) * GIB)
    return None
