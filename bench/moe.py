"""The MoE kernel against the bandwidth floor and against vLLM's own fused MoE on the zeroed weights.

A row is a number of tokens, a share of pruned blocks and a routing. Its bytes are the kept blocks of the experts that
the batch chose, each once, with inputs and output; the floor is these bytes at the bandwidth that a large copy reached
in the same run, on a CPU the time of reading the same blocks, in turn with the calls. Every call has a routing of its
own, so that the experts of one are not in the cache for the next, and both kernels are interleaved on the same
batches. A row whose result is wrong, or whose rows depend on their batch for up to 64 tokens, gets no speed.

The kernel is timed with the layer's dtype and with 8-bit weights in turn, both against vLLM's in that dtype. Rows are
written as they are measured; --resume goes on.

On a GPU a CUDA graph of 39 calls over several layers is replayed, on a CPU single calls are timed, of the path that
LAGUNA_CPU_ISA names or else the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import structs

from laguna_serve.bench.moe_layer.layers import Shape, choose_clock, find_path, measure_bandwidth
from laguna_serve.bench.moe_layer.options import MoeConfig
from laguna_serve.bench.moe_layer.report import render_markdown, render_text, summarise
from laguna_serve.bench.moe_layer.result import LayerSettings, MoeResult, MoeRow
from laguna_serve.bench.moe_layer.timing import KernelTimer, MoeBenchError, make_shape
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import hold_out

__all__ = ["MoeConfig", "MoeResult", "main", "time_kernels"]
RESULT = "moe.json"
DESCRIPTION = "Time the sentinel MoE kernel against the bandwidth floor and vLLM's fused MoE."
EXAMPLES = """
examples:
  python bench/moe.py --out out/moe                                   the usual rows, on the GPU if there is one
  python bench/moe.py --tokens 1,2,4,8,16,17,32,64,256,1024 --pruning 0,0.1,0.25,0.4 --out out/moe --resume
  LAGUNA_CPU_ISA=avx2 python bench/moe.py --tokens 1,8 --threads 1 --out out/avx2
  python bench/moe.py --experts 16 --hidden 160 --intermediate 128 --block 16 --topk 4 --out out/toy

exit status: 0 every row was measured, 1 a row was refused, 2 could not run, 130 interrupted (finished rows are kept)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/moe.py",
        MoeConfig,
        DESCRIPTION,
        EXAMPLES,
        others=(torch.OutOfMemoryError,),
        measures=True,
        interrupted="nothing was measured",
    )
    return command.run(
        argv,
        time_kernels,
        show=render_text,
        judge=lambda result: INTERRUPTED if result.partial else FELL_SHORT if result.refused else HELD,
    )


@hold_out
def time_kernels(config: MoeConfig) -> MoeResult:
    """Measure every row, and write moe.json, moe.md and moe.png to `config.out`.

    Raises:
        MoeBenchError: no such device, a shape that the kernel does not take, more than memory holds, or rows to resume
            that are of another layer or path.
        ResultError: the folder of a run to resume holds another file.
        KeyboardInterrupt: it ended before a row was measured. Later, the result says that it is partial.
    """
    shape = make_shape(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return _time_kernels(config, shape)
    finally:
        torch.set_num_threads(threads)


def _time_kernels(config: MoeConfig, shape: Shape) -> MoeResult:
    environment, progress = read_environment(current_argv()), Progress()
    load = OtherLoad()
    measured = _read_measured(config, shape, environment) if config.resume else []
    bandwidth = measure_bandwidth(shape.device)
    bandwidth["floor"] = max(bandwidth.values())
    timer = KernelTimer(config, shape, bandwidth["floor"], measured)
    listed: list[MoeRow] = []

    def make_result(*, partial: bool) -> MoeResult:
        rows = join_rows(listed, measured)
        return MoeResult(
            environment=load.note(environment),
            settings=describe(config, shape),
            bandwidth_gb_s=bandwidth,
            stock=timer.stock,
            rows=rows,
            refused=[f"{row.name}: {row.refused}" for row in rows if row.refused],
            partial=partial,
        )

    interrupted = False
    try:
        for done, row in enumerate(timer.list_rows(), start=1):
            listed.append(row)
            write_result(config.out / RESULT, make_result(partial=True))
            progress.say(f"  {done}/{timer.total} {row.name}: {summarise(row)}")
    except KeyboardInterrupt:
        if not listed:
            raise
        interrupted = True
    result = make_result(partial=interrupted)
    write_result(config.out / RESULT, result)
    write_text(config.out / "moe.md", render_markdown(result))
    from laguna_serve.bench.moe_layer.plot import draw  # takes a second to import

    draw(result, config.out / "moe.png")
    return result


def join_rows(listed: Sequence[MoeRow], measured: Sequence[MoeRow]) -> list[MoeRow]:
    """Join a run's rows with those of an earlier one that it was not asked for, or has not come to."""
    keys = {row.key for row in listed}
    others = [row for row in measured if row.key not in keys]
    return sorted([*listed, *others], key=lambda row: row.key) if others else list(listed)


def _read_measured(config: MoeConfig, shape: Shape, environment: Environment) -> list[MoeRow]:
    """Read the rows that an earlier run into the same folder measured, of the same layer by the same path.

    Raises:
        MoeBenchError: they are of another one, or of another processor.
        ResultError: the folder holds another file.
    """
    if not (config.out / RESULT).exists():
        return []
    earlier = read_result(config.out / RESULT, MoeResult)
    settings = describe(config, shape)
    if earlier.settings != settings:
        pairs = zip(structs.asdict(settings).items(), structs.asdict(earlier.settings).values(), strict=True)
        apart = [(f"{name} {here}", f"{there}") for (name, here), there in pairs if here != there]
        expected, got = (", ".join(side) for side in zip(*apart, strict=True))
        raise MoeBenchError(f"--resume: expected rows of {expected}, got {got}; pass another --out")
    here, there = (" ".join([one.cpu or "unknown", *one.isa]) for one in (environment, earlier.environment))
    if settings.device == "cpu" and earlier.environment.isa and here != there:
        raise MoeBenchError(f"--resume: expected rows of {here}, got those of {there}; pass another --out")
    return [row for row in earlier.rows if not row.refused]


def describe(config: MoeConfig, shape: Shape) -> LayerSettings:
    """Describe the layer and the machine."""
    return LayerSettings(
        device=torch.cuda.get_device_name() if shape.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        experts=shape.experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        block=shape.block,
        topk=shape.topk,
        dtype=config.dtype,
        seed=config.seed,
        path=find_path(shape),
        clock=choose_clock(shape.device),
    )


if __name__ == "__main__":
    raise SystemExit(main())
