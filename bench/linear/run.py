"""The bfloat16 linear op against torch's bfloat16 and float32 products, and vLLM's linear layers, on the CPU.

Every call has a matrix of its own, so that the weights come from memory as in an engine, and the kernel, torch in both
types, vLLM's own layers and a plain read of as many bytes take turns. A row whose result is wrong, or whose rows
depend on their batch, gets no speed. LAGUNA_CPU_ISA holds the kernel to a path, ONEDNN_MAX_CPU_ISA and
ATEN_CPU_CAPABILITY torch and vLLM.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import UNSET

from laguna_serve.bench.linear.result import LinearResult, LinearRow
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import ANY, MOST_THREADS, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.kit.tables import INTERRUPTED_RUN, Table
from laguna_serve.serving.machine.rates import LIMITS

__all__ = ["LinearConfig", "LinearResult", "main", "time_linear"]
DESCRIPTION = "Time the bfloat16 linear op for CPUs against torch's products and vLLM's."
EXAMPLES = """
examples:
  python bench/linear --out out/linear
  python bench/linear --shapes 2048x8192,160x512 --rows 1,8 --out out/linear
  LAGUNA_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python bench/linear --out out/avx2

exit status: 0 every row was measured, 1 a row was refused, 2 could not run, 130 interrupted (finished rows are kept)
"""
HEADS = (
    "inputs × outputs",
    "rows",
    "kernel µs",
    "bf16 µs",
    "fp32 µs",
    "vLLM µs",
    "× bf16 (95%)",
    "× fp32 (95%)",
    "× vLLM (95%)",
    "GB/s",
    "of read",
)
# Of matrices that are smaller, filling a cache takes more of them than can be made.
FEWEST_WEIGHTS = 256


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Matrices and numbers of rows; the files go to `out`."""

    shapes: Annotated[
        tuple[str, ...],
        Flag("inputs × outputs (default: 160x512,2048x8192,4096x256,2048x100352)", metavar="KxN,…"),
    ] = ("160x512", "2048x8192", "4096x256", "2048x100352")
    rows: Annotated[tuple[int, ...], Flag("default: 1,8,64", metavar="LIST", at_least=1, at_most=ANY)] = (1, 8, 64)
    threads: Annotated[
        int,
        Flag("as many as an engine has with one core left (default: 1)", metavar="N", at_least=1, at_most=MOST_THREADS),
    ] = 1
    vllm: Annotated[bool, Flag("leave vLLM's layers out")] = True
    seconds: Annotated[float, Flag("for each row (default: 3)", metavar="S", at_least=0)] = 3.0
    out: Annotated[Path, Flag("folder for linear.json and linear.md", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what is no shape, and values outside of their bounds."""
        check_bounds(self)
        for shape in self.shapes:
            if re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) is None:
                raise FlagError(f"--shapes: expected inputs x outputs like 2048x8192, got {shape!r}")
            if math.prod(map(int, shape.split("x"))) < FEWEST_WEIGHTS:
                raise FlagError(f"--shapes: expected {FEWEST_WEIGHTS} weights or more, got {shape}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/linear", LinearConfig, DESCRIPTION, EXAMPLES, measures=True, interrupted="nothing was measured"
    )
    return command.run(
        argv,
        time_linear,
        show=render_text,
        judge=lambda result: INTERRUPTED if result.partial else FELL_SHORT if result.refused else HELD,
    )


@hold_out
def time_linear(config: LinearConfig) -> LinearResult:
    """Measure every row, and write linear.json and linear.md to `config.out`.

    Raises:
        LinearBenchError: the op cannot be built, or a matrix is more than memory holds.
        KeyboardInterrupt: it ended before a row was measured. Later, the result says that it is partial.
    """
    from laguna_serve.bench.linear import timing  # imports torch, which takes a second

    timing.require_kernel(config.threads)
    if config.vllm:
        timing.require_vllm()
    shapes = tuple((int(shape.partition("x")[0]), int(shape.partition("x")[2])) for shape in config.shapes)
    timing.require_memory(shapes, max(config.rows))
    path, torch_isa = timing.find_paths()
    environment, progress, load = read_environment(current_argv()), Progress(), OtherLoad()
    rows: list[LinearRow] = []
    interrupted = False
    try:
        for row in timing.list_rows(shapes, config.rows, config.seconds, vllm=config.vllm):
            rows.append(row)
            progress.say(f"  {len(rows)}/{len(shapes) * len(config.rows)} {row.name}: {summarise(row)}")
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
    result = LinearResult(
        environment=load.note(environment),
        path=path,
        torch_isa=torch_isa,
        threads=config.threads,
        limits={name: os.environ[name] for name in LIMITS if name in os.environ},
        rows=rows,
        refused=[f"{row.name}: {row.refused}" for row in rows if row.refused],
        partial=interrupted,
    )
    write_result(config.out / "linear.json", result)
    write_text(config.out / "linear.md", f"```text\n{render_text(result)}\n```\n")
    return result


def render_text(result: LinearResult) -> str:
    """Render what was timed where, and a row for each setting."""
    held = ", ".join(f"{name}={value}" for name, value in result.limits.items())
    lines = [
        f"linear: bfloat16 by the kernel ({result.path}), torch ({result.torch_isa}), its float32, vLLM's layers",
        f"{result.environment.cpu}, {' '.join(result.environment.isa)}; threads: {result.threads}",
        *([f"held to fewer instructions by {held}"] if held else []),
        "",
        Table("l" + "r" * 10, HEADS, [_list_cells(row) for row in result.rows]).to_text(),
    ]
    lines += [f"refused: {reason}" for reason in result.refused]
    return "\n".join([*lines, *([INTERRUPTED_RUN] if result.partial else [])])


def summarise(row: LinearRow) -> str:
    """Summarise a row in a few words."""
    if row.refused:
        return f"REFUSED: {row.refused}"
    return f"{row.kernel_us:.1f} µs, {row.against_bfloat16:.2f} × bf16, {row.against_float32:.2f} × fp32"


def _list_cells(row: LinearRow) -> list[str]:
    cells = [f"{row.inputs} × {row.outputs}", str(row.rows)]
    if row.against_bfloat16_ci95 is UNSET or row.against_float32_ci95 is UNSET:
        return [*cells, "refused", *[""] * (len(HEADS) - 3)]
    times = (row.kernel_us, row.bfloat16_us, row.float32_us, row.vllm_us)
    cells += ["–" if us is UNSET else f"{us:.1f}" for us in times]
    for ratio, interval in (
        (row.against_bfloat16, row.against_bfloat16_ci95),
        (row.against_float32, row.against_float32_ci95),
        (row.against_vllm, row.against_vllm_ci95),
    ):
        cells.append("–" if interval is UNSET else f"{ratio:.2f} ({interval[0]:.2f}–{interval[1]:.2f})")
    return [*cells, f"{row.gb_s:.1f}", f"{row.read_share:.0%}"]
