"""Measure the tiles of the sentinel MoE kernels on a GPU, and write the table that its like will use from then on.

What compiles for the device without spills is timed over three layers of XS.2 by CUDA graphs of 39 calls; a row of the
table is the candidate with the least sum of medians over the numbers of tokens, relative to the shipped row. With
--plan nothing is timed: the candidates are compiled, for any capability and without a GPU. tiles.json (schema
laguna_serve.moe_tiles/1) goes to DIR with device, date, versions and every timing; copied to
kernels/sentinel_moe/tables/ under the name that is printed, or named by LAGUNA_MOE_TILES, it is in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
import torch

from laguna_serve.bench.moe_tuning.measure import Clock
from laguna_serve.bench.moe_tuning.result import Candidate, TileSizes, TilesTable, TunedRow
from laguna_serve.bench.moe_tuning.space import find_space
from laguna_serve.kernels.sentinel_moe.binaries import SHARED_LIMITS
from laguna_serve.kernels.sentinel_moe.tables import name_file
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import MOST_THREADS, BoundedConfig, Flag
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import make_out
from laguna_serve.serving.kit.tables import Table

EXAMPLES = """
examples:
  python bench/moe_tuning --out out/tiles                                       on the GPU of this machine
  python bench/moe_tuning --plan --capability 90 --weights fp8 --out out/plan   what would be timed, without one

exit status: 0 a table or plan was written, 2 could not run
"""
PathName = Literal["decode", "prefill"]
WeightsName = Literal["16-bit", "fp8"]
TOKENS: dict[PathName, tuple[int, ...]] = {"decode": (1, 8, 24), "prefill": (256, 2048)}


class TuningError(CommandError, ValueError):
    """Tiles cannot be measured as asked, as one line."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(BoundedConfig):
    """Which rows of the table are measured; the file goes to `out`."""

    path: Annotated[tuple[PathName, ...], Flag("default: decode,prefill", metavar="P,…", group="what to measure")] = (
        "decode",
        "prefill",
    )
    weights: Annotated[tuple[WeightsName, ...], Flag("default: 16-bit,fp8", metavar="W,…")] = ("16-bit", "fp8")
    plan: Annotated[bool, Flag("compile the candidates and time nothing; needs no GPU")] = False
    capability: Annotated[
        int | None, Flag("of the plan, as 90 (default: this machine's GPU)", metavar="N", at_least=80)
    ] = None
    most: Annotated[
        int | None,
        Flag("variants of a row that are compiled, the shipped one first (default: all)", metavar="N", at_least=1),
    ] = None
    replays: Annotated[int, Flag("of each candidate (default: 9)", metavar="N", at_least=1)] = 9
    threads: Annotated[int, Flag("that compile (default: 8)", metavar="N", at_least=1, at_most=MOST_THREADS)] = 8
    out: Annotated[Path, Flag("folder for tiles.json", metavar="DIR")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    command = Command(
        "bench/moe_tuning",
        TuningConfig,
        __doc__,
        EXAMPLES,
        others=(torch.OutOfMemoryError,),
        measures=lambda config: not config.plan,
    )
    return command.run(argv, tune, show=lambda result: tabulate(result).to_text())


def tune(config: TuningConfig) -> TilesTable:
    """Compile the candidates, time them unless it is a plan, and write tiles.json to `config.out`.

    Raises:
        TuningError: there is no GPU to time them on, or no shared memory is known of the capability.
    """
    capability = find_capability(config)
    make_out(config.out)
    progress, rows = Progress(), []
    for path in dict.fromkeys(config.path):
        for weights in dict.fromkeys(config.weights):
            space = find_space(path, weights, capability, config.threads, config.most)
            progress.say(f"  {path} {weights}: {len(space)} candidates fit sm_{capability}")
            clock = None if config.plan else Clock(weights, TOKENS[path], config.replays)
            candidates = []
            for tiles, pair in space:
                candidate = Candidate(
                    tiles=msgspec.convert(asdict(tiles), TileSizes),
                    registers=(pair[0].registers, pair[1].registers),
                    shared_bytes=(pair[0].shared_bytes, pair[1].shared_bytes),
                    us={} if clock is None else clock.time(tiles),
                )
                candidates.append(candidate)
            rows.append(TunedRow(path=path, weights=weights, tiles=choose(candidates), candidates=candidates))
    result = TilesTable(
        environment=read_environment(current_argv()),
        device=f"sm_{capability}" if config.plan else torch.cuda.get_device_name(),
        plan=config.plan,
        rows=rows,
    )
    write_result(config.out / "tiles.json", result)
    if not config.plan:
        progress.say(f"  for kernels/sentinel_moe/tables: {name_file(result.device)}")
    return result


def find_capability(config: TuningConfig) -> int:
    """Find the GPU's, or the plan's.

    Raises:
        TuningError: as `tune`.
    """
    if not config.plan and not torch.cuda.is_available():
        raise TuningError("device: expected a GPU, got none; pass --plan to see what would be timed on one")
    if config.plan and config.capability is not None:
        capability = config.capability
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    else:
        raise TuningError("--capability: expected one for a plan without a GPU, got none; pass 90 for an H100 or H200")
    if capability not in SHARED_LIMITS:
        known = ", ".join(map(str, SHARED_LIMITS))
        raise TuningError(f"--capability: expected one of {known}, got {capability}; add its shared memory")
    return capability


def choose(candidates: Sequence[Candidate]) -> TileSizes:
    """Find the least sum of medians relative to the first, the shipped row, which a plan keeps."""
    shipped = candidates[0]

    def cost(candidate: Candidate) -> float:
        return sum(median(us) / median(shipped.us[tokens]) for tokens, us in candidate.us.items())

    return min(candidates, key=cost).tiles


def tabulate(result: TilesTable) -> Table:
    """Lay out a line for each row of the table."""
    lines = []
    for row in result.rows:
        chosen = next(candidate for candidate in row.candidates if candidate.tiles == row.tiles)
        times = ", ".join(f"{median(us):.1f} at {tokens}" for tokens, us in chosen.us.items()) or "not timed"
        sizes = " ".join(str(value) for value in msgspec.structs.astuple(row.tiles))
        lines.append([row.path, row.weights, str(len(row.candidates)), sizes, times])
    return Table("llrll", ("path", "weights", "candidates", "tiles", "µs"), lines)


if __name__ == "__main__":
    raise SystemExit(main())
