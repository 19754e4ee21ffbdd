"""How fast this processor multiplies in bfloat16 and in float32: without bf16 arithmetic the wider type can be faster.

Such processors (x86 with AVX2 or plain AVX-512) run bf16 products in a scalar fall-back of torch and oneDNN, where
eight rows cost eight times one row, so that verifying drafts has no advantage. Which type wins is measured, in a
process of its own, once per processor, torch and libraries' settings, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from laguna_serve.serving.kit.files import WriteError, write_text
from laguna_serve.serving.machine.device import read_isa

# Instructions that multiply in bfloat16; `bf16` is ARM's.
BF16_ARITHMETIC = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
# oneDNN's and ATen's own limits, for which a processor may be better than it is used.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
WITHOUT_BF16 = frozenset(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"))
ROWS = (1, 8)
TIMEOUT_S = 120.0
PROBE = """
import json, sys, time
import torch

rows = [int(count) for count in sys.argv[1:]]
weight = torch.randn(4096, 1024)
cases = {(name, count): (torch.randn(count, 1024).to(kind), weight.to(kind))
         for name, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)) for count in rows}
best = dict.fromkeys(cases, float("inf"))
with torch.inference_mode():
    end, left = time.perf_counter() + 1.0, 20
    while time.perf_counter() < end or left > 0:
        left -= 1
        for case, (inputs, matrix) in cases.items():
            begin = time.perf_counter()
            torch.nn.functional.linear(inputs, matrix)
            best[case] = min(best[case], time.perf_counter() - begin)
print(json.dumps({name: {count: best[name, count] * 1e3 for count in rows} for name, _ in cases}))
"""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Best time in ms of a product of so many rows [rows, 1024] with a matrix [1024, 4096], by type."""

    bfloat16: dict[int, float]
    float32: dict[int, float]

    @property
    def gain(self) -> float:
        """Time in bfloat16 ÷ time in float32, over one row and eight together: above 1 float32 is faster."""
        return sum(self.bfloat16.values()) / sum(self.float32.values())


def multiplies_bf16(isa: Sequence[str] | None = None) -> bool:
    """Has the processor bf16 arithmetic, and may the libraries use it? `isa`: as `read_isa` gives it."""
    limited = any(os.environ.get(name, "").upper() in WITHOUT_BF16 for name in LIMITS)
    return not limited and bool(BF16_ARITHMETIC & set(read_isa() if isa is None else isa))


def find_rates() -> Rates | None:
    """The rates of this machine: kept ones, else measured in about a second. None where torch cannot be asked."""
    path = _place()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Rates)
    except (OSError, msgspec.MsgspecError):
        pass
    rates = measure_rates()
    if rates is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, msgspec.json.encode(rates).decode())
        except (OSError, WriteError):
            pass  # measured again the next time
    return rates


def measure_rates() -> Rates | None:
    """Measure them in a child process, which has torch. None where that fails."""
    command = [sys.executable, "-c", PROBE, *map(str, ROWS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        return msgspec.convert(json.loads(done.stdout), Rates, strict=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _place() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = [*read_isa(), *(os.environ.get(name, "") for name in LIMITS), str(len(os.sched_getaffinity(0)))]
    parts.append(metadata.version("torch") if _has_torch() else "")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache / "laguna-serve" / "rates" / f"{digest}.json"


def _has_torch() -> bool:
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    return True
