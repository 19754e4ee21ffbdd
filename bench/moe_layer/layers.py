"""What bench/moe.py times: one MoE layer pruned and zeroed, its routing, and the clocks of a CPU and a GPU.

Kernel benchmarks are the one part of bench/ that imports torch and, for the comparison, vLLM's own fused MoE.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from laguna_serve.kernels.isa import ask_for_tiles
from laguna_serve.kernels.sentinel_moe import cpu, sentinel_moe, sentinel_moe_reference
from laguna_serve.kernels.sentinel_moe.reference import SCALED_COLUMNS
from laguna_serve.plugins.pruning import rank_groups

# ‖out − reference‖ ÷ ‖reference‖: the rounding of the activations and of the result, see tests/kernels.
ERROR_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
INVARIANT_TOKENS = 64
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}
GRAPH_CALLS = 39  # the sparse layers of Laguna XS.2: what one step of decoding calls
SKEW = 0.6  # effective experts ÷ experts of the skewed routing, as measured for Laguna-like routers on C4


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: E experts of N atoms in blocks of B, hidden size H, k experts per token."""

    experts: int
    hidden: int
    intermediate: int
    block: int
    topk: int
    dtype: torch.dtype
    device: torch.device

    @property
    def block_bytes(self) -> int:
        """Gate, up and down of one block."""
        return 3 * self.block * self.hidden * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """The unpruned routed experts."""
        return self.experts * (self.intermediate // self.block) * self.block_bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """x [T, H], weights [T, k] fp32, ids [T, k] int32."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's kept blocks, and the same weights at full width with the pruned atoms zeroed (None: not needed).

    Scales, [..., ⌈H / 128⌉] in fp32, belong to kept blocks in 8 bits.
    """

    w13_blocks: torch.Tensor
    w2_blocks: torch.Tensor
    block_start: torch.Tensor
    w13: torch.Tensor | None
    w2: torch.Tensor | None
    w13_scales: torch.Tensor | None = None
    w2_scales: torch.Tensor | None = None


def make_layer(shape: Shape, pruning: float, seed: int, *, with_zeroed: bool) -> Layer:
    """Random weights, of which a random share of blocks is pruned; every expert keeps at least one."""
    E, N, H, B = shape.experts, shape.intermediate, shape.hidden, shape.block
    scores = np.random.default_rng(seed).random((1, E, N // B), dtype=np.float32)
    keep = torch.from_numpy(rank_groups(scores, pruning)[0])  # [E, G]
    generator = torch.Generator(shape.device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=shape.device, dtype=shape.dtype)

    w13 = draw(E, 2, N, H).mul_(H**-0.5)
    w2 = draw(E, N, H).mul_(N**-0.5)  # down columns as rows
    kept = keep.to(shape.device)
    w13_blocks = w13.view(E, 2, -1, B, H).transpose(1, 2)[kept].contiguous()
    w2_blocks = w2.view(E, -1, B, H)[kept].contiguous()
    start = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)]).to(shape.device, torch.int32)
    if not with_zeroed:
        return Layer(w13_blocks, w2_blocks, start, None, None)
    gone = ~kept.repeat_interleave(B, 1)  # [E, N]
    w13.masked_fill_(gone[:, None, :, None], 0)
    w2.masked_fill_(gone[:, :, None], 0)
    return Layer(w13_blocks, w2_blocks, start, w13.view(E, 2 * N, H), w2.transpose(1, 2).contiguous())


def quantise(layer: Layer) -> Layer:
    """Give the kept blocks 8 bits (e4m3), each row's 128 columns by a scale of their own."""
    w13, w13_scales = _quantise(layer.w13_blocks)
    w2, w2_scales = _quantise(layer.w2_blocks)
    return Layer(w13, w2, layer.block_start, None, None, w13_scales, w2_scales)


def _quantise(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    H = blocks.shape[-1]
    groups = -(-H // SCALED_COLUMNS)
    codes = torch.empty_like(blocks, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*blocks.shape[:-1], groups, dtype=torch.float32, device=blocks.device)
    for block, to, own in zip(blocks, codes, scales, strict=True):  # one at a time: no fp32 copy of a whole layer
        columns = torch.nn.functional.pad(block.float(), (0, groups * SCALED_COLUMNS - H)).unflatten(-1, (groups, -1))
        own.copy_(columns.abs().amax(-1).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max)
        to.copy_((columns / own[..., None]).flatten(-2)[..., :H])
    return codes, scales


class Router:
    """Draws batches: `uniform`, or `skewed` by a Zipf law whose effective number of experts is SKEW · E.

    Experts of a token are distinct: the k largest of log p + Gumbel noise, a sample without replacement.
    """

    def __init__(self, shape: Shape, kind: str, seed: int) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        rank = torch.arange(1, shape.experts + 1, dtype=torch.float64)
        exponent = 0.0 if kind == "uniform" else _solve_exponent(rank, SKEW * shape.experts)
        shares = rank**-exponent / (rank**-exponent).sum()
        self.effective_experts = float(torch.exp(-(shares * shares.log()).sum()))
        self.log_shares = shares.log()[torch.randperm(shape.experts, generator=self.generator)]

    def draw(self, tokens: int) -> Batch:
        """Draw a batch with its own routing."""
        shape = self.shape
        noise = -torch.empty(tokens, shape.experts, dtype=torch.float64).exponential_(generator=self.generator).log()
        ids = (self.log_shares + noise).topk(shape.topk, dim=1).indices.to(torch.int32)
        weights = torch.rand(tokens, shape.topk, generator=self.generator)
        weights = weights / weights.sum(1, keepdim=True)
        x = torch.randn(tokens, shape.hidden, generator=self.generator).to(shape.dtype)
        return Batch(x.to(shape.device), weights.to(shape.device), ids.to(shape.device))


def run_kernel(layer: Layer, batch: Batch, shape: Shape) -> torch.Tensor:
    """Run the kernel that is measured."""
    return sentinel_moe(
        batch.x,
        batch.weights,
        batch.ids,
        layer.w13_blocks,
        layer.w2_blocks,
        layer.block_start,
        w13_scales=layer.w13_scales,
        w2_scales=layer.w2_scales,
        max_blocks_per_expert=shape.intermediate // shape.block,
    )


def find_path(shape: Shape) -> str | None:
    """Which instructions the kernel uses on a CPU."""
    return cpu.describe() if shape.device.type == "cpu" else None


def read_blocks(layer: Layer, batch: Batch) -> None:
    """Read what the kernel would, and compute nothing; where the kernel is plain torch, what it would as one sum."""
    tensors = (batch.x, batch.weights, batch.ids, layer.w13_blocks, layer.w2_blocks, layer.block_start)
    if cpu.load() is not None:
        torch.ops.laguna_serve.sentinel_moe_read.default(*tensors, layer.w13_scales, layer.w2_scales)
        return
    for blocks in (layer.w13_blocks, layer.w2_blocks):
        share = len(batch.ids.unique()) / (len(layer.block_start) - 1)
        blocks.view(torch.int32).flatten()[: int(share * blocks.numel() * blocks.itemsize // 4)].sum()


def bytes_read(layer: Layer, batch: Batch) -> int:
    """Kept blocks of the distinct experts of a batch, its inputs and its output, each once."""
    widths = layer.block_start.diff().cpu()
    blocks = int(widths[batch.ids.cpu().unique().long()].sum())
    held = (layer.w13_blocks, layer.w2_blocks, layer.w13_scales, layer.w2_scales)
    block_bytes = sum(tensor[0].nbytes for tensor in held if tensor is not None)
    return blocks * block_bytes + 2 * batch.x.nbytes + batch.weights.nbytes + batch.ids.nbytes


def find_fault(layer: Layer, batch: Batch, shape: Shape) -> tuple[float, str | None]:
    """Find the op's error against the reference, and what is wrong with it, if anything is."""
    out = run_kernel(layer, batch, shape)
    inputs = (batch.x, batch.weights, batch.ids, layer.w13_blocks, layer.w2_blocks, layer.block_start)
    reference = sentinel_moe_reference(*inputs, w13_scales=layer.w13_scales, w2_scales=layer.w2_scales).double()
    error = float((out.double() - reference).norm() / reference.norm())
    limit = ERROR_LIMITS[shape.dtype]
    if not error <= limit:
        return error, f"expected an error of at most {limit:g} against the reference, got {error:.3g}"
    tokens = len(out)
    if tokens <= INVARIANT_TOKENS:
        for t in range(tokens):
            row = Batch(batch.x[t : t + 1], batch.weights[t : t + 1], batch.ids[t : t + 1])
            if not torch.equal(run_kernel(layer, row, shape)[0], out[t]):
                return error, f"expected row {t} alone to equal row {t} of the batch bit for bit, got other bits"
    return error, None


def make_stock(layer: Layer, shape: Shape) -> Callable[[Batch], torch.Tensor]:
    """vLLM's own fused MoE over the zeroed weights.

    Raises:
        ImportError, AttributeError, RuntimeError: vLLM is not there or has no such op for this shape.
    """
    assert layer.w13 is not None
    assert layer.w2 is not None
    w13, w2 = layer.w13, layer.w2
    if shape.device.type == "cpu":
        from vllm import _custom_ops as ops

        isa = "amx" if shape.dtype == torch.bfloat16 and ask_for_tiles() else "vec"
        w13, w2 = ops.cpu_prepack_moe_weight(w13, isa), ops.cpu_prepack_moe_weight(w2, isa)

        def run_cpu(batch: Batch) -> torch.Tensor:
            out = torch.empty_like(batch.x)
            ops.cpu_fused_moe(out, batch.x, w13, w2, None, None, batch.weights, batch.ids, "silu", isa)
            return out

        return run_cpu
    from vllm.model_executor.layers.fused_moe import fused_experts

    def run_gpu(batch: Batch) -> torch.Tensor:
        out: torch.Tensor = fused_experts(batch.x, w13, w2, batch.weights, batch.ids)
        return out

    return run_gpu


def choose_stock_config(shape: Shape) -> str:
    """Which tuned table vLLM's fused MoE will use on this GPU; on Hopper, where none ships, the H100's for the shape.

    Sets VLLM_TUNED_CONFIG_FOLDER, so it is to be called before vLLM is asked to run. Read in vLLM 0.32.0.
    """
    from vllm.model_executor.layers.fused_moe import fused_moe

    name: str = fused_moe.get_config_file_name(shape.experts, shape.intermediate, None)
    folder = Path(fused_moe.__file__).parent / "configs"
    if (folder / name).exists():
        return f"vLLM's own {name}"
    h100 = f"E={shape.experts},N={shape.intermediate},device_name=NVIDIA_H100_80GB_HBM3.json"
    if torch.cuda.get_device_capability() != (9, 0) or not (folder / h100).exists():
        return "vLLM's default (not tuned for this GPU and shape)"
    tuned = Path(tempfile.mkdtemp(prefix="laguna-moe-"))
    shutil.copy(folder / h100, tuned / name)
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(tuned)
    return f"vLLM's {h100}, taken for this GPU"


def time_calls(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device idle before and after."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    clock = CLOCKS[choose_clock(device)]
    began = clock()
    call()
    return clock() - began


def choose_clock(device: torch.device) -> Literal["wall", "processor"]:
    """Take the calling thread's processor time where it does all the work: what others do then counts less."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def record_graph(calls: Callable[[], object]) -> Callable[[], object]:
    """Replays `calls` from a CUDA graph, so that no launch from Python is timed."""
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def measure_bandwidth(device: torch.device) -> dict[str, float]:
    """GB/s of the best of several passes over 512 MiB: a copy (bytes read and written), and on a CPU a sum (read)."""
    source = torch.ones(2**27, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    passes = {"copy": (lambda: target.copy_(source), 2 * source.nbytes)}
    if device.type == "cpu":
        passes["read"] = (lambda: source.sum(), source.nbytes)
    return {name: size / min(time_calls(call, device) for _ in range(9)) / 1e9 for name, (call, size) in passes.items()}


def _solve_exponent(rank: torch.Tensor, effective: float) -> float:
    low, high = 0.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = rank**-middle / (rank**-middle).sum()
        wide = math.exp(-float((shares * shares.log()).sum())) > effective
        low, high = (middle, high) if wide else (low, middle)
    return low
