"""The MoE kernel against the bandwidth floor and against vLLM's own fused MoE on the zeroed weights.

A row is a number of tokens, a share of pruned blocks and a routing.  Its bytes are the kept blocks of the experts that
the batch chose, each once, with inputs and output; the floor is these bytes at the bandwidth that a large copy reached
in the same run (on a CPU: the better of a copy and a sum, as the op mostly reads).  Every call has a routing of its
own, so that the experts of one are not in the cache for the next, and both kernels are called in turn on the same
batches.  A row whose result is wrong, or whose rows depend on their batch for up to 16 tokens, gets no speed.

On a GPU a CUDA graph of 39 calls over several layers is replayed, on a CPU single calls are timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from laguna_serve.bench.moe_layer import layers
from laguna_serve.bench.moe_layer.layers import Batch, Layer, Router, Shape
from laguna_serve.bench.stats.intervals import RoundPair, bootstrap_speedup, pool_speedup
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_json, write_text

SCHEMA = "laguna_serve.moe/1"
EXAMPLES = """
examples:
  python bench/moe.py --out out/moe                                   everything, on the GPU if there is one
  python bench/moe.py --tokens 1,8,64 --pruning 0,0.4 --out out/moe   a part of it
  python bench/moe.py --experts 16 --hidden 160 --intermediate 128 --block 16 --topk 4 --out out/toy

exit status: 0 every row was measured, 1 a row was refused, 2 could not run, 130 interrupted (finished rows are kept)
"""
CALLS_CPU, REPLAYS_GPU = 40, 30
LAYERS_GPU = 3  # 4.8 GB at full size, against 50 MB of second-level cache


class MoeBenchError(CommandError, ValueError):
    """The benchmark cannot run as asked, as one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = _parse(argv)
    others = (torch.OutOfMemoryError,)
    return run_command("moe.py", lambda: run(args), measures=True, others=others, interrupted="nothing was measured")


def run(args: argparse.Namespace) -> int:
    """Measure every row, write the result and print it. Returns the exit status."""
    rows: list[dict[str, Any]] = []
    interrupted = False
    shape = make_shape(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    header = describe(args, shape)
    try:
        rows.extend(measure(args, shape, header))
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
    refused = [f"{_name(row)}: {row['refused']}" for row in rows if row["refused"]]
    result = {"schema": SCHEMA, **header, "rows": rows, "refused": refused, "partial": interrupted}
    publish(result, out, always_json=args.json)
    if interrupted:
        return INTERRUPTED
    return FELL_SHORT if refused else HELD


def measure(args: argparse.Namespace, shape: Shape, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row after the other; the weights of one share of pruning are in memory at a time."""
    total = len(args.pruning) * len(args.routing) * len(args.tokens)
    done = 0
    for pruning in args.pruning:
        copies = LAYERS_GPU if shape.device.type == "cuda" else 1
        made = [layers.make_layer(shape, pruning, args.seed + i, with_zeroed=not args.no_vllm) for i in range(copies)]
        stock = None if args.no_vllm else _prepare_stock(made, shape, header)
        if shape.device.type == "cpu":  # packed by vLLM's op: the plain copy is not needed any more
            made = [Layer(item.w13_blocks, item.w2_blocks, item.block_start, None, None) for item in made]
        for routing in args.routing:
            router = Router(shape, routing, args.seed)
            for tokens in args.tokens:
                row = {"tokens": tokens, "pruning": pruning, "routing": routing}
                row |= {"effective_experts": router.effective_experts}
                row |= measure_row(made, stock, router, tokens, shape, args.repeats, header["bandwidth_gb_s"]["floor"])
                done += 1
                print(f"  {done}/{total} {_name(row)}: {_summary(row)}", file=sys.stderr, flush=True)
                yield row


def measure_row(
    made: list[Layer],
    stock: list[Callable[[Batch], torch.Tensor]] | None,
    router: Router,
    tokens: int,
    shape: Shape,
    repeats: int | None,
    floor_gb_s: float,
) -> dict[str, Any]:
    """Check one setting, then time it; a wrong result is refused a time."""
    error, fault = layers.find_fault(made[0], router.draw(tokens), shape)
    if fault is not None:
        return {"error": error if math.isfinite(error) else None, "refused": fault}
    on_gpu = shape.device.type == "cuda"
    calls, repeats = (layers.GRAPH_CALLS, repeats or REPLAYS_GPU) if on_gpu else (1, repeats or CALLS_CPU)
    ours_s: list[float] = []
    stock_s: list[float] = []
    sizes: list[int] = []
    distinct: list[int] = []
    batches = [router.draw(tokens) for _ in range(calls)]
    arms = _make_arms(made, stock, batches, shape) if on_gpu else None
    for repeat in range(repeats + 1):
        if arms is None:
            batches = [router.draw(tokens)]
        for ours in (True, False) if repeat % 2 == 0 else (False, True):
            if not ours and stock is None:
                continue
            call = arms[0 if ours else 1] if arms is not None else _call_once(made, stock, batches[0], shape, ours)
            seconds = layers.time_calls(call, shape.device) / calls
            if repeat > 0:  # the first pass warms up
                (ours_s if ours else stock_s).append(seconds)
        sizes += [layers.bytes_read(made[i % len(made)], batch, shape) for i, batch in enumerate(batches)]
        distinct += [len(batch.ids.unique()) for batch in batches]
    row = _describe_times(ours_s, statistics.mean(sizes), floor_gb_s)
    row |= {"error": error, "refused": None, "distinct_experts": statistics.mean(distinct)}
    return row | (_compare(ours_s, stock_s) if stock_s else {"stock_us": None, "ratio": None, "ratio_ci95": None})


def _call_once(
    made: list[Layer], stock: list[Callable[[Batch], torch.Tensor]] | None, batch: Batch, shape: Shape, ours: bool
) -> Callable[[], object]:
    if ours or stock is None:
        return lambda: layers.run_ours(made[0], batch, shape)
    run = stock[0]
    return lambda: run(batch)


def _make_arms(
    made: list[Layer], stock: list[Callable[[Batch], torch.Tensor]] | None, batches: list[Batch], shape: Shape
) -> list[Callable[[], object]]:
    def ours() -> None:
        for i, batch in enumerate(batches):
            layers.run_ours(made[i % len(made)], batch, shape)

    arms = [layers.record_graph(ours)]
    if stock is not None:
        runs = stock

        def theirs() -> None:
            for i, batch in enumerate(batches):
                runs[i % len(runs)](batch)

        arms.append(layers.record_graph(theirs))
    return arms


def _prepare_stock(
    made: list[Layer], shape: Shape, header: dict[str, Any]
) -> list[Callable[[Batch], torch.Tensor]] | None:
    """vLLM's kernel for each layer, or None, with the reason in the header, where it cannot be had."""
    try:
        if shape.device.type == "cuda":
            header["stock"] = layers.choose_stock_config(shape)
        runs = [layers.make_stock(layer, shape) for layer in made]
        out = runs[0](Router(shape, "uniform", 0).draw(2))
        if not bool(out.isfinite().all()):
            raise RuntimeError("its output is not finite")
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        header["stock"] = f"not measured: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return None
    return runs


def _describe_times(seconds: list[float], size: float, floor_gb_s: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [median] * 9
    return {
        "us": median * 1e6,
        "us_p10_p90": [deciles[0] * 1e6, deciles[-1] * 1e6],
        "bytes": size,
        "gb_s": size / median / 1e9,
        "floor_us": size / floor_gb_s / 1e3,
        "percent_of_floor": 100 * size / median / 1e9 / floor_gb_s,
    }


def _compare(ours_s: list[float], stock_s: list[float]) -> dict[str, Any]:
    """Our time ÷ vLLM's, pooled over the pairs of calls, with its 95% interval."""
    pairs = [RoundPair(1, theirs, 1, mine) for mine, theirs in zip(ours_s, stock_s, strict=True)]
    low, high = bootstrap_speedup(pairs, seed=0)
    return {
        "stock_us": statistics.median(stock_s) * 1e6,
        "ratio": 1 / pool_speedup(pairs),
        "ratio_ci95": [1 / high, 1 / low],
    }


def make_shape(args: argparse.Namespace) -> Shape:
    """The layer that was asked for.

    Raises:
        MoeBenchError: no such device, a block that does not divide the experts, or more than memory holds.
    """
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise MoeBenchError("--device: expected a CUDA device, got none; pass --device cpu")
    experts = args.experts or (256 if kind == "cuda" else 64)
    if args.intermediate % args.block or args.block % 16 or args.hidden % 16:
        got = f"hidden {args.hidden}, intermediate {args.intermediate}, block {args.block}"
        raise MoeBenchError(f"shape: expected multiples of 16, and of the block between the experts, got {got}")
    if args.topk > min(experts, 16):
        raise MoeBenchError(f"--topk: expected at most {min(experts, 16)}, got {args.topk}; lower it")
    dtype: torch.dtype = getattr(torch, args.dtype)
    shape = Shape(experts, args.hidden, args.intermediate, args.block, args.topk, dtype, torch.device(kind))
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else psutil.virtual_memory().available
    need = (4 if not args.no_vllm else 2) * shape.layer_bytes * (LAYERS_GPU if kind == "cuda" else 1)
    if need > free:
        sizes = f"{need / 2**30:.1f} GiB for {experts} experts, got {free / 2**30:.1f} GiB"
        raise MoeBenchError(f"memory: expected {sizes}; pass fewer --experts or --no-vllm")
    return shape


def describe(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Everything of the result but its rows."""
    bandwidth = layers.measure_bandwidth(shape.device)
    bandwidth["floor"] = max(bandwidth.values())
    settings = {
        "device": torch.cuda.get_device_name() if shape.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "experts": shape.experts,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "block": shape.block,
        "topk": shape.topk,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    return {
        "environment": describe_environment(current_argv()),
        "settings": settings,
        "bandwidth_gb_s": bandwidth,
        "stock": "not measured: --no-vllm" if args.no_vllm else "vLLM's cpu_fused_moe, weights packed",
    }


def publish(result: dict[str, Any], out: Path, *, always_json: bool) -> None:
    """Write the files and print the result."""
    table = render(result)
    write_json(out / "moe.json", result)
    write_text(out / "moe.md", f"```text\n{table}\n```\n")
    from laguna_serve.bench.moe_layer.plot import draw  # takes a second to import

    draw(result, out / "moe.png")
    print_result(table, result, out, always_json=always_json)


def render(result: dict[str, Any]) -> str:
    """The table for people."""
    settings, bandwidth = result["settings"], result["bandwidth_gb_s"]
    read = f", read {bandwidth['read']:.1f}" if "read" in bandwidth else ""
    lines = [
        "MoE layer: {experts} experts × {intermediate}, hidden {hidden}, top-{topk}, blocks of {block}, {dtype}".format(
            **settings
        ),
        f"device {settings['device']}, {settings['threads']} threads; GB/s: copy {bandwidth['copy']:.1f}{read}",
        f"vLLM: {result['stock']}",
        "",
        "routing  tokens  pruned  experts        µs   (p10–p90)     GB/s  of floor   vLLM µs   ours ÷ vLLM (95%)",
    ]
    for row in result["rows"]:
        start = f"{row['routing']:<8} {row['tokens']:>6}  {row['pruning']:>6.0%}"
        if row["refused"]:
            lines.append(f"{start}  refused: {row['refused']}")
            continue
        low, high = row["us_p10_p90"]
        times = (
            f"{row['us']:>9.1f} {f'({low:.0f}–{high:.0f})':>15} {row['gb_s']:>8.1f} {row['percent_of_floor']:>8.0f}%"
        )
        ratio = (
            "{:>9.1f}   {:.3f} ({:.3f}–{:.3f})".format(row["stock_us"], row["ratio"], *row["ratio_ci95"])
            if row["ratio"]
            else ""
        )
        lines.append(f"{start} {row['distinct_experts']:>8.1f} {times} {ratio}")
    return "\n".join(lines)


def _summary(row: dict[str, Any]) -> str:
    if row["refused"]:
        return f"REFUSED: {row['refused']}"
    versus = f", {row['ratio']:.2f} × vLLM's" if row["ratio"] else ""
    return f"{row['us']:.1f} µs, {row['gb_s']:.1f} GB/s{versus}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['routing']}, {row['tokens']} tokens, {row['pruning']:.0%} pruned"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def list_of(kind: Callable[[str], Any], low: float, below: float) -> Callable[[str], list[Any]]:
        def parse(text: str) -> list[Any]:
            try:
                values = [kind(item) for item in text.split(",")]
            except ValueError:
                raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}") from None
            if not all(low <= value < below for value in values):
                raise argparse.ArgumentTypeError(f"expected numbers from {low} to below {below}, got {text}")
            return values

        return parse

    def routings(text: str) -> list[str]:
        kinds = text.split(",")
        if not set(kinds) <= {"uniform", "skewed"}:
            raise argparse.ArgumentTypeError(f"expected uniform, skewed or both, got {text}")
        return kinds

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
        return int(text)

    parser = Parser(
        prog="bench/moe.py",
        description="Time the sentinel MoE kernel against the bandwidth floor and vLLM's fused MoE.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tokens", metavar="LIST", type=list_of(int, 1, 65537), default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--pruning", metavar="LIST", type=list_of(float, 0, 1), default=[0.0, 0.1, 0.25, 0.4])
    parser.add_argument("--routing", metavar="LIST", type=routings, default=["uniform", "skewed"])
    parser.add_argument("--experts", metavar="E", type=positive, help="default: 256 on a GPU, 64 on a CPU")
    parser.add_argument("--hidden", metavar="H", type=positive, default=2048)
    parser.add_argument("--intermediate", metavar="N", type=positive, default=512)
    parser.add_argument("--block", metavar="B", type=positive, default=64)
    parser.add_argument("--topk", metavar="K", type=positive, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", metavar="N", type=positive, help="timed calls (CPU: 40) or replays (GPU: 30)")
    parser.add_argument("--no-vllm", action="store_true", help="our kernel alone")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for moe.json, moe.md and moe.png")
    add_json_flag(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
