"""Times the linear op and torch's products on the same inputs in turn; a wrong result gets no time."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from msgspec import structs

from laguna_serve.bench.linear.result import LinearRow
from laguna_serve.kernels.linear import choose_path, linear, linear_reference, load_library
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.machine.memory import GIB

# Matrices of one shape that are gone through, so that an engine's caches hold none of them for the next call.
SPREAD_BYTES = 256 << 20
FEWEST_CALLS = 10
# Of the largest output: one rounding to bfloat16, and float32 sums of another order.
MOST_ERROR = 2**-7
KERNEL, BFLOAT16, FLOAT32, VLLM, READ = "kernel", "bfloat16", "float32", "vLLM", "read"
Arm = Callable[[int], object]


class LinearBenchError(CommandError, RuntimeError):
    """The benchmark cannot run here, as one line."""


def require_kernel(threads: int) -> None:
    """Load the op and have products run on so many threads. Raises LinearBenchError where the op cannot be built."""
    torch.set_num_threads(threads)
    if load_library() is None:
        raise LinearBenchError("kernels/linear: expected it to build, it did not (see above); install g++")


def require_vllm() -> None:
    """Raise LinearBenchError where vLLM's layers cannot be asked."""
    try:
        import vllm.model_executor.layers.utils  # noqa: F401
    except ImportError as error:
        raise LinearBenchError(f"vLLM: expected it here, got {error}; pass --no-vllm to leave its layers out") from None


def require_memory(shapes: tuple[tuple[int, int], ...], rows: int) -> None:
    """Refuse what does not fit: a matrix as drawn, in both types, as vLLM arranges it and to read, and so many rows.

    Raises LinearBenchError.
    """
    free = psutil.virtual_memory().available
    for inputs, outputs in shapes:
        needed = 14 * inputs * outputs + 2 * SPREAD_BYTES + rows * (10 * inputs + 18 * outputs)
        if needed > free:
            got = f"{inputs}x{outputs} with {rows} rows, which takes {needed / GIB:,.1f} GiB"
            raise LinearBenchError(f"memory: expected at most {free / GIB:,.1f} GiB, got {got}; choose smaller ones")


@dataclass(frozen=True, slots=True)
class Matrices:
    """Weights [outputs, inputs] of one shape, in both types, and as many bytes that are only read.

    `layers`: vLLM's products with them; none where it is not asked.
    """

    narrow: list[torch.Tensor]
    wide: list[torch.Tensor]
    layers: list[Callable[[torch.Tensor], torch.Tensor]]
    bytes: int
    reader: Reader


class Reader:
    """Reads memory as fast as the C library compares it, on as many threads as the products use."""

    def __init__(self, size: int, threads: int) -> None:
        self._buffer = torch.ones(max(size, SPREAD_BYTES), dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads
        self._compare = ctypes.CDLL(None).memcmp
        self._compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def read(self, index: int, size: int) -> None:
        """Read `size` bytes, others for another index."""
        places = max(1, self._buffer.numel() // size)
        start, part = self._buffer.data_ptr() + index % places * size, size // self._threads // 2
        if self._threads == 1:
            self._compare(start, start + part, part)
            return
        starts = [start + 2 * part * thread for thread in range(self._threads)]
        list(self._pool.map(lambda at: self._compare(at, at + part, part), starts))


def list_rows(
    shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...], seconds: float, *, vllm: bool
) -> Iterator[LinearRow]:
    """One row after the other; the matrices of one shape are in memory at a time. `vllm`: with its own products."""
    for inputs, outputs in shapes:
        matrices = make_matrices(inputs, outputs, vllm=vllm)
        for count in rows:
            yield measure_row(matrices, LinearRow(inputs=inputs, outputs=outputs, rows=count), seconds)


def make_matrices(inputs: int, outputs: int, *, vllm: bool) -> Matrices:
    """Random ones, as many as it takes that they come from memory."""
    size = 2 * inputs * outputs
    torch.manual_seed(0)
    narrow = [torch.randn(outputs, inputs).bfloat16() for _ in range(max(1, SPREAD_BYTES // 3 // size))]
    layers = [make_layer(weight) for weight in narrow] if vllm else []
    return Matrices(narrow, [weight.float() for weight in narrow], layers, size, Reader(size, torch.get_num_threads()))


def make_layer(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the product of a linear layer of vLLM's, as it has it without the kernel."""
    from vllm.model_executor.layers import utils

    layer: Any = torch.nn.Module()
    layer.weight = weight
    dispatch = utils.dispatch_cpu_unquantized_gemm
    getattr(dispatch, "__wrapped__", dispatch)(layer, remove_weight=False)
    return lambda x: layer.cpu_linear(x, weight, None)


def measure_row(matrices: Matrices, blank: LinearRow, seconds: float) -> LinearRow:
    """Check one number of rows, then time it for that long; a wrong result is refused a time."""
    x = torch.randn(blank.rows, blank.inputs).bfloat16()
    error, fault = find_fault(x, matrices.narrow[0])
    if fault is not None:
        return structs.replace(blank, error=error, refused=fault)
    wide, product = x.float(), torch.nn.functional.linear
    arms: dict[str, Arm] = {
        KERNEL: lambda index: linear(x, matrices.narrow[index % len(matrices.narrow)]),
        BFLOAT16: lambda index: product(x, matrices.narrow[index % len(matrices.narrow)]),
        FLOAT32: lambda index: product(wide, matrices.wide[index % len(matrices.wide)]),
        READ: lambda index: matrices.reader.read(index, matrices.bytes),
    }
    if matrices.layers:
        arms[VLLM] = lambda index: matrices.layers[index % len(matrices.layers)](x)
    return describe(structs.replace(blank, error=error), time_arms(arms, seconds), matrices.bytes)


def find_fault(x: torch.Tensor, weight: torch.Tensor) -> tuple[float | None, str | None]:
    """Find the op's error, and what is wrong with its result: values, or a row that depends on its batch."""
    out, expected = linear(x, weight), linear_reference(x, weight)
    error = float((out.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= MOST_ERROR:
        finite = error if math.isfinite(error) else None
        return finite, f"expected an error of at most {MOST_ERROR:.2g}, got {error:.2g}"
    if not torch.equal(linear(x[-1:], weight)[0], out[-1]):
        return error, "expected the last row alone to equal the last row of the batch bit for bit"
    return error, None


def time_arms(arms: dict[str, Arm], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, one arm after the other, in turn the other way round; each on a matrix of its own."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for index, call in enumerate(arms.values()):
            call(index)
        end, done = time.perf_counter() + seconds, 0
        while done < FEWEST_CALLS or time.perf_counter() < end:
            order = list(arms.items()) if done % 2 == 0 else list(reversed(arms.items()))
            for place, (name, call) in enumerate(order):
                begin = time.perf_counter()
                call(done * len(arms) + place)
                times[name].append(time.perf_counter() - begin)
            done += 1
    return times


def describe(row: LinearRow, times: dict[str, list[float]], size: int) -> LinearRow:
    """Describe the row with its times, and how many times as fast as torch the kernel is."""
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    speedups = {
        name: estimate_median(times[name], times[KERNEL]) for name in (BFLOAT16, FLOAT32, VLLM) if name in times
    }
    if VLLM in times:
        ratio, interval = speedups[VLLM]
        row = structs.replace(row, vllm_us=median[VLLM] * 1e6, against_vllm=ratio, against_vllm_ci95=interval)
    return structs.replace(
        row,
        calls=len(times[KERNEL]),
        kernel_us=median[KERNEL] * 1e6,
        bfloat16_us=median[BFLOAT16] * 1e6,
        float32_us=median[FLOAT32] * 1e6,
        against_bfloat16=speedups[BFLOAT16][0],
        against_bfloat16_ci95=speedups[BFLOAT16][1],
        against_float32=speedups[FLOAT32][0],
        against_float32_ci95=speedups[FLOAT32][1],
        gb_s=size / median[KERNEL] / 1e9,
        read_share=median[READ] / median[KERNEL],
    )


def estimate_median(theirs: list[float], ours: list[float]) -> tuple[float, tuple[float, float]]:
    """Estimate the median of the rounds' ratios, and its 95% interval by order statistics.

    Other processes stop a call now and then for longer than a thousand of them take: a mean would be theirs.
    """
    ratios = sorted(their_s / our_s for their_s, our_s in zip(theirs, ours, strict=True))
    last, reach = len(ratios) - 1, 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(last / 2 - reach)), min(last, int(last / 2 + reach) + 1)
    return statistics.median(ratios), (ratios[low], ratios[high])


def find_paths() -> tuple[str, str]:
    """Whose instructions the kernel and torch use."""
    return choose_path(), torch.backends.cpu.get_cpu_capability()
