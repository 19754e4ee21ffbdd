"""How fast this processor multiplies in bfloat16 and in float32: a fixed probe, measured once and kept.

A processor without bf16 arithmetic (x86 with AVX2 or plain AVX-512) runs bf16 products in a fall-back of torch and
oneDNN, where eight rows cost three to eight times one row, so that verifying drafts gains little; kernels/linear does
not, and is faster elsewhere, too, if it can be built. Which of them wins is measured, in a process of its own, once
per processor, torch and libraries' settings, and kept in the user's cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec

from laguna_serve.kernels import isa
from laguna_serve.kernels.isa import IsaError, choose_path, uses_linear_op
from laguna_serve.serving.machine.cache import find_own_cache
from laguna_serve.serving.machine.device import read_isa
from laguna_serve.serving.machine.threads import THREADS, choose_threads

# What an engine's arithmetic may be held by, and with it these rates.
LIMITS = (*isa.LIMITS, isa.VARIABLE, isa.KERNELS_VARIABLE)
ROWS = (1, 8)
# What the probe multiplies with: threads as for a model of that size.
SMALL_BYTES = 1024 * 4096 * 2
# How many times as fast float32 must be for twice the memory, above what a busy machine's measurement may err by.
WORTH_IT = 1.1
TIMEOUT_S = 120.0
PROBE = """
import json, sys, time
import torch

rows = [int(count) for count in sys.argv[1:]]
weight = torch.randn(4096, 1024)
linear = torch.nn.functional.linear
arms = [("bfloat16", torch.bfloat16, linear), ("float32", torch.float32, linear)]
path = None
try:
    from laguna_serve.kernels import linear as ours
    if ours.uses_linear_op() and ours.load_library() is not None:
        path = ours.choose_path()
        arms.append(("kernel", torch.bfloat16, ours.linear))
except (ImportError, ValueError):
    pass
cases = {(name, count): (product, torch.randn(count, 1024).to(kind), weight.to(kind))
         for name, kind, product in arms for count in rows}
best = dict.fromkeys(cases, float("inf"))
with torch.inference_mode():
    end, left = time.perf_counter() + 1.0, 20
    while time.perf_counter() < end or left > 0:
        left -= 1
        for case, (product, inputs, matrix) in cases.items():
            begin = time.perf_counter()
            product(inputs, matrix)
            best[case] = min(best[case], time.perf_counter() - begin)
found = {name: {str(count): best[name, count] * 1e3 for count in rows} for name, _, _ in arms}
print(json.dumps({**found, "path": path, "torch_isa": torch.backends.cpu.get_cpu_capability()}))
"""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Best time in ms of a product of [rows, 1024] with a matrix [1024, 4096], by number of rows, for each type.

    Attributes:
        bfloat16, float32: torch's.
        kernel: bfloat16 by kernels/linear; None where it is not needed or cannot be built.
        path: the instruction set that the kernel uses.
        torch_isa: the one that torch uses.
    """

    bfloat16: dict[str, float]
    float32: dict[str, float]
    kernel: dict[str, float] | None = None
    path: str | None = None
    torch_isa: str | None = None

    @property
    def gain(self) -> float:
        """Time in bfloat16, as engines compute it, ÷ time in float32, one row and eight together."""
        return sum((self.kernel or self.bfloat16).values()) / sum(self.float32.values())

    @property
    def prefers_float32(self) -> bool:
        """Whether float32 is faster by more than a little."""
        return self.gain > WORTH_IT

    @property
    def kernel_gain(self) -> float | None:
        """Time of torch's bfloat16 ÷ time of the kernel's."""
        return None if self.kernel is None else sum(self.bfloat16.values()) / sum(self.kernel.values())


def find_rates() -> Rates | None:
    """Find the rates of this machine: kept ones, else measured in about a second. None where torch cannot be asked."""
    path = _place()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Rates)
    except (OSError, msgspec.MsgspecError):
        pass
    rates = measure_rates()
    if rates is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = path.with_suffix(f".{os.getpid()}")
            made.write_bytes(msgspec.json.encode(rates))
            made.replace(path)
        except OSError:
            pass  # measured again the next time
    return rates


def measure_rates() -> Rates | None:
    """Measure them in a child process, which has torch and an engine's threads. None where that fails."""
    command = [sys.executable, "-c", PROBE, *map(str, ROWS)]
    environment = {THREADS: str(choose_threads(SMALL_BYTES)), **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=environment
        )  # fmt: skip
        return msgspec.json.decode(done.stdout, type=Rates)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError):
        return None


def describe_rates(rates: Rates, *, bf16: bool) -> str:
    """Describe what engines multiply with here, as a part of a sentence. `bf16`: the processor has bf16 arithmetic."""
    if rates.kernel_gain is not None and not rates.prefers_float32:
        by = f"bfloat16 by laguna_serve::linear ({rates.path})"
        return f"{by}, {rates.kernel_gain:.1f} times as fast as torch's, {1 / rates.gain:.1f} times as float32"
    if bf16:
        return f"bfloat16 in the processor's own arithmetic, {1 / rates.gain:.1f} times as fast as float32"
    if rates.prefers_float32:
        return f"no fast bfloat16 in this processor: float32 is {rates.gain:.1f} times as fast"
    return f"no fast bfloat16 in this processor; float32 is {rates.gain:.1f} times as fast"


def list_rates(rates: Rates) -> str:
    """List times in ms of one row and of eight, by type."""
    times = {"bfloat16": rates.bfloat16, "bfloat16 by laguna_serve::linear": rates.kernel, "float32": rates.float32}
    shown = [f"{name} {' / '.join(f'{ms:.2f}' for ms in by.values())}" for name, by in times.items() if by is not None]
    return f"ms for {' / '.join(rates.float32)} rows of 1024 by 4096: {', '.join(shown)}"


def _place() -> Path:
    parts = [*read_isa(), *(os.environ.get(name, "") for name in (*LIMITS, "CXX", "OMP_NUM_THREADS"))]
    parts += [str(len(os.sched_getaffinity(0))), PROBE, _find_torch(), _find_op()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return find_own_cache() / "rates" / f"{digest}.json"


def _find_op() -> str:
    """Name the path of the linear op where it is used, or nothing."""
    try:
        return choose_path() if uses_linear_op() else ""
    except IsaError:
        return ""


@functools.cache
def _find_torch() -> str:
    """Its version, or nothing."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
