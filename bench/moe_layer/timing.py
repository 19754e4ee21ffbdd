"""Times the sentinel MoE kernel and vLLM's on the same batches, row by row; a wrong result gets no time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from msgspec import structs

from laguna_serve.bench.moe_layer import layers
from laguna_serve.bench.moe_layer.layers import Batch, Layer, Router, Shape
from laguna_serve.bench.moe_layer.options import MoeConfig
from laguna_serve.bench.moe_layer.result import MoeRow
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup
from laguna_serve.serving.kit.errors import CommandError, first_line
from laguna_serve.serving.machine.memory import GIB

CALLS_CPU, REPLAYS_GPU = 40, 30
STOCK = "vLLM"
LAYERS_GPU = 3  # 4.8 GB at full size, against 50 MB of second-level cache
Kernel = Callable[[Batch], torch.Tensor]
Call = Callable[[], object]


class MoeBenchError(CommandError, ValueError):
    """The benchmark cannot run as asked, as one line."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed at one share of pruning: copies of a layer by kind of weights, and vLLM's kernels, if any."""

    shape: Shape
    layers: dict[str, Sequence[Layer]]
    stock: Sequence[Kernel] | None

    def list_kernels(self) -> dict[str, Callable[[int, Batch], torch.Tensor]]:
        """List the kernel by kind of weights, and vLLM's, each called with the index of a copy and a batch."""
        kernels: dict[str, Callable[[int, Batch], torch.Tensor]] = {}
        for kind, copies in self.layers.items():
            kernels[kind] = lambda index, batch, copies=copies: layers.run_kernel(  # type: ignore[misc]
                copies[index % len(copies)], batch, self.shape
            )
        if (stock := self.stock) is not None:
            kernels[STOCK] = lambda index, batch: stock[index % len(stock)](batch)
        return kernels


@dataclass(slots=True)
class Seconds:
    """Of every timed call by kernel, and of reading the same by kind of weights; what the batches were."""

    of: dict[str, list[float]] = field(default_factory=dict)
    reads: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    distinct: list[int] = field(default_factory=list)


class KernelTimer:
    """Times every row of a configuration. `stock`: what is held against the kernel, or why nothing is."""

    def __init__(self, config: MoeConfig, shape: Shape, floor_gb_s: float, measured: Sequence[MoeRow] = ()) -> None:
        self._config, self._shape, self._floor_gb_s = config, shape, floor_gb_s
        self._measured = {row.key: row for row in measured}
        self.stock = "vLLM's cpu_fused_moe, weights packed" if config.vllm else "not measured: --no-vllm"
        self._kinds: tuple[str, ...] = config.weights or ("full", "fp8")
        self.total = len(config.pruning) * len(config.routing) * len(config.tokens) * len(self._kinds)

    def list_rows(self) -> Iterator[MoeRow]:
        """One row after the other; the weights of one share of pruning are in memory at a time."""
        config, shape = self._config, self._shape
        for pruning in config.pruning:
            subject: Subject | None = None
            for routing in config.routing:
                router = Router(shape, routing, config.seed)
                for tokens in config.tokens:
                    blanks = [
                        MoeRow(
                            tokens=tokens,
                            pruning=pruning,
                            routing=routing,
                            weights=kind,
                            effective_experts=router.effective_experts,
                            error=None,
                            refused=None,
                        )
                        for kind in self._kinds
                    ]
                    if all(blank.key in self._measured for blank in blanks):
                        yield from (self._measured[blank.key] for blank in blanks)
                        continue
                    subject = subject or self._make_subject(pruning)
                    yield from measure_rows(subject, router, blanks, config.repeats, self._floor_gb_s)

    def _make_subject(self, pruning: float) -> Subject:
        config, shape = self._config, self._shape
        copies = LAYERS_GPU if shape.device.type == "cuda" else 1
        made = [layers.make_layer(shape, pruning, config.seed + i, with_zeroed=config.vllm) for i in range(copies)]
        stock = self._prepare_stock(made) if config.vllm else None
        if shape.device.type == "cpu":  # packed by vLLM's op: the plain copy is not needed any more
            made = [Layer(item.w13_blocks, item.w2_blocks, item.block_start, None, None) for item in made]
        as_kind = {"full": lambda layer: layer, "fp8": layers.quantise}
        return Subject(shape, {kind: [as_kind[kind](layer) for layer in made] for kind in self._kinds}, stock)

    def _prepare_stock(self, made: Sequence[Layer]) -> list[Kernel] | None:
        """vLLM's kernel for each layer, or None, with the reason in `stock`, where it cannot be had."""
        try:
            if self._shape.device.type == "cuda":
                self.stock = layers.choose_stock_config(self._shape)
            kernels = [layers.make_stock(layer, self._shape) for layer in made]
            out = kernels[0](Router(self._shape, "uniform", 0).draw(2))
            if not bool(out.isfinite().all()):
                raise RuntimeError("its output is not finite")
        except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
            self.stock = f"not measured: {first_line(error)}"
            return None
        return kernels


def measure_rows(
    subject: Subject, router: Router, blanks: Sequence[MoeRow], repeats: int | None, floor_gb_s: float
) -> list[MoeRow]:
    """Check one setting for each kind of weights, then time them in turn; a wrong result is refused a time."""
    checked: list[MoeRow] = []
    for blank in blanks:
        error, fault = layers.find_fault(subject.layers[blank.kind][0], router.draw(blank.tokens), subject.shape)
        checked.append(structs.replace(blank, error=error if math.isfinite(error) else None, refused=fault))
    right = [row.kind for row in checked if not row.refused]
    if not right:
        return checked
    sound = Subject(subject.shape, {kind: subject.layers[kind] for kind in right}, subject.stock)
    on_gpu = subject.shape.device.type == "cuda"
    repeats = repeats or (REPLAYS_GPU if on_gpu else CALLS_CPU)
    seconds = (_time_replays if on_gpu else _time_calls)(sound, router, blanks[0].tokens, repeats)
    return [row if row.refused else describe(row, seconds, floor_gb_s) for row in checked]


def _time_calls(subject: Subject, router: Router, tokens: int, repeats: int) -> Seconds:
    """Single calls, all kernels on the same batch of its own, each followed by reading what it read."""
    seconds = Seconds()
    kernels = subject.list_kernels()
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            batch = router.draw(tokens)
            calls = {name: lambda kernel=kernel, batch=batch: kernel(0, batch) for name, kernel in kernels.items()}
            _time_round(subject, calls, [batch], repeat, seconds)
            for kind, copies in subject.layers.items():
                read_s = layers.time_calls(
                    lambda layer=copies[0], batch=batch: layers.read_blocks(layer, batch),  # type: ignore[misc]
                    subject.shape.device,
                )
                if repeat > 0:
                    seconds.reads.setdefault(kind, []).append(read_s)
    return seconds


def _time_replays(subject: Subject, router: Router, tokens: int, repeats: int) -> Seconds:
    """Time a CUDA graph of GRAPH_CALLS calls per kernel over the copies, replayed."""
    seconds = Seconds()
    batches = [router.draw(tokens) for _ in range(layers.GRAPH_CALLS)]

    def record(kernel: Callable[[int, Batch], torch.Tensor]) -> Call:
        def run() -> None:
            for index, batch in enumerate(batches):
                kernel(index, batch)

        return layers.record_graph(run)

    replays = {name: record(kernel) for name, kernel in subject.list_kernels().items()}
    for repeat in range(repeats + 1):
        _time_round(subject, replays, batches, repeat, seconds)
    return seconds


def _time_round(
    subject: Subject, calls: Mapping[str, Call], batches: Sequence[Batch], repeat: int, seconds: Seconds
) -> None:
    """Every kernel once, the first of them in turn; the first round warms up."""
    names = list(calls)
    turn = repeat % len(names)
    for name in names[turn:] + names[:turn]:
        each_s = layers.time_calls(calls[name], subject.shape.device) / len(batches)
        if repeat > 0:
            seconds.of.setdefault(name, []).append(each_s)
    for index, batch in enumerate(batches):
        for kind, copies in subject.layers.items():
            size = layers.bytes_read(copies[index % len(copies)], batch)
            seconds.sizes.setdefault(kind, []).append(size)
        seconds.distinct.append(len(batch.ids.unique()))


def describe(row: MoeRow, seconds: Seconds, floor_gb_s: float) -> MoeRow:
    """Describe the row: its times, and their ratio to vLLM's, pooled over pairs of calls, with its 95% interval."""
    kernel_s, stock_s = seconds.of[row.kind], seconds.of.get(STOCK, [])
    median, size = statistics.median(kernel_s), statistics.mean(seconds.sizes[row.kind])
    deciles = statistics.quantiles(kernel_s, n=10) if len(kernel_s) > 1 else [median] * 9
    gb_s = size / median / 1e9
    timed = structs.replace(
        row,
        us=median * 1e6,
        us_p10_p90=(deciles[0] * 1e6, deciles[-1] * 1e6),
        bytes=size,
        gb_s=gb_s,
        floor_us=size / floor_gb_s / 1e3,
        percent_of_floor=100 * gb_s / floor_gb_s,
        distinct_experts=statistics.mean(seconds.distinct),
        stock_us=None,
        ratio=None,
        ratio_ci95=None,
    )
    if reads := seconds.reads.get(row.kind):
        shares = [100 * read / kernel for read, kernel in zip(reads, kernel_s, strict=True)]
        floor_us = statistics.median(reads) * 1e6
        timed = structs.replace(timed, floor_us=floor_us, percent_of_floor=statistics.median(shares))
    if not stock_s:
        return timed
    pairs = [RoundPair(1, stock, 1, kernel) for kernel, stock in zip(kernel_s, stock_s, strict=True)]
    low, high = bootstrap_speedup(pairs, seed=0)
    return structs.replace(
        timed,
        stock_us=statistics.median(stock_s) * 1e6,
        ratio=1 / pool_speedup(pairs),
        ratio_ci95=(1 / high, 1 / low),
    )


def make_shape(config: MoeConfig) -> Shape:
    """Make the layer that was asked for.

    Raises:
        MoeBenchError: no such device, a block that does not divide the experts, a share of pruned blocks that leaves
            some expert none, or more than memory holds.
    """
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise MoeBenchError("--device: expected a CUDA device, got none; pass --device cpu")
    experts = config.experts or (256 if kind == "cuda" else 64)
    if config.intermediate % config.block or config.block % 16 or config.hidden % 16:
        got = f"hidden {config.hidden}, intermediate {config.intermediate}, block {config.block}"
        raise MoeBenchError(f"shape: expected multiples of 16, and of the block between the experts, got {got}")
    most = 1 - config.block / config.intermediate
    if max(config.pruning) > most:
        got = f"{max(config.pruning):g}; lower it, or --block"
        raise MoeBenchError(f"--pruning: expected at most {most:g}, as every expert keeps a block, got {got}")
    if config.topk > min(experts, 16):
        raise MoeBenchError(f"--topk: expected at most {min(experts, 16)}, got {config.topk}; lower it")
    dtype: torch.dtype = getattr(torch, config.dtype)
    shape = Shape(experts, config.hidden, config.intermediate, config.block, config.topk, dtype, torch.device(kind))
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else psutil.virtual_memory().available
    need = (4.5 if config.vllm else 2.5) * shape.layer_bytes * (LAYERS_GPU if kind == "cuda" else 1)
    if need > free:
        sizes = f"{need / GIB:.1f} GiB for {experts} experts, got {free / GIB:.1f} GiB"
        raise MoeBenchError(f"memory: expected {sizes}; pass fewer --experts or --no-vllm")
    return shape
