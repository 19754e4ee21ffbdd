"""Every published release on every GPU that can be planned for: what runs, with how much context, and why not.

    python scripts/release_matrix.py

writes bench/results/release-matrix.json and .md from the releases' configs (tests/fixtures/releases); nothing is
started, and nothing of this machine enters but the version of the code. Memory is worked out and not measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Struct, field

from laguna_serve.serving.kit.cli import HELD, print_result, run_command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, read_flags_and_json
from laguna_serve.serving.kit.results import write_indented
from laguna_serve.serving.kit.run_dir import make_out
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.devices import GPUS, plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.result import PlanResult, describe_plan

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / "tests" / "fixtures" / "releases"
COMMAND = "python scripts/release_matrix.py"
# Large enough for any release, so that what is refused is refused for its numbers.
CPU = Device("cpu", "CPU with AVX-512 and AMX, 1 TiB", 1 << 40, 1 << 40, isa=("avx512f", "amx_tile"))
MOST_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class ReleaseMatrixConfig:
    """Which releases to plan for, and where the two files go."""

    releases: Annotated[Path, Flag("folder of folders with a config.json", metavar="DIR")] = RELEASES
    out: Annotated[Path, Flag("folder for the two files", metavar="DIR")] = ROOT / "bench" / "results"


class MatrixCell(Struct, frozen=True, kw_only=True):
    """A release, alone or with its drafter, on a device, or on as few of them as serve it; sizes in bytes.

    Attributes:
        as_device: the device's name in the planner; `devices`: how many.
        context_one: longest sequence alone, in tokens; `context_64`: of 64 at once.
        refused: why it is not served.
    """

    as_device: str
    model: str
    draft: str | None
    device: str
    devices: int
    served: bool
    model_class: str = field(name="class")
    verdict: str
    why: str | None
    gamma: int | None
    vendor_gamma: tuple[int, ...] | None
    weight_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    context_one: int
    context_64: int
    refused: list[str]


class ReleaseMatrix(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.release_matrix/1"):
    """Every pair of a release and its drafter on every device."""

    command: str
    devices: list[str]
    cells: list[MatrixCell]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        ReleaseMatrixConfig, argv, prog="scripts/release_matrix.py", description=__doc__
    )

    def run() -> int:
        matrix = write_matrix(config)
        served = sum(cell.served for cell in matrix.cells)
        line = {"cells": len(matrix.cells), "served": served, "out": str(config.out)}
        print_result(f"{served} of {len(matrix.cells)} cells are served", line, config.out, always_json=always_json)
        return HELD

    return run_command("release_matrix.py", run)


def write_matrix(config: ReleaseMatrixConfig) -> ReleaseMatrix:
    """Plan every cell, and write release-matrix.json and release-matrix.md to `config.out`."""
    matrix = make_matrix(config.releases)
    make_out(config.out)
    write_indented(config.out / "release-matrix.json", matrix)
    write_text(config.out / "release-matrix.md", format_matrix(matrix))
    return matrix


def make_matrix(folder: Path) -> ReleaseMatrix:
    """Every pair on every device."""
    devices = {**{name: plan_for(name) for name in GPUS}, "cpu": CPU}
    cells = [
        plan_cell(folder, model, draft, name, device)
        for model, draft in list_pairs(folder)
        for name, device in devices.items()
    ]
    return ReleaseMatrix(command=COMMAND, devices=list(devices), cells=cells)


def list_pairs(folder: Path) -> list[tuple[str, str | None]]:
    """Every model alone, and with the drafter that is published for it."""
    names = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
    drafters = [name for name in names if "dflash" in name.lower()]
    pairs: list[tuple[str, str | None]] = []
    for name in names:
        if name in drafters:
            continue
        family = re.sub(r"-(FP8|NVFP4|INT4)$", "", name)
        names_of_drafters = (name.replace(family, f"{family}-DFlash"), f"{family}-speculator.dflash")
        draft = next((drafter for drafter in names_of_drafters if drafter in drafters), None)
        pairs += [(name, None)] if draft is None else [(name, None), (name, draft)]
    return pairs


def plan_cell(folder: Path, model: str, draft: str | None, name: str, device: Device) -> MatrixCell:
    """Plan a cell on one device, or on as few of them as serve it."""
    ranks = 1
    while True:
        plan = _plan(folder, model, draft, device, ranks)
        assert plan.target is not None, "its config is there"
        assert plan.target.verdict is not None
        refused = plan.target.verdict.how == "refused"
        if plan.ok or device.kind == "cpu" or ranks == MOST_RANKS or refused:
            break
        ranks *= 2
    assert plan.memory is not None
    assert plan.kv_cache is not None
    assert plan.context is not None
    return MatrixCell(
        as_device=name,
        model=model,
        draft=draft,
        device=device.name,
        devices=ranks,
        served=plan.ok,
        model_class=next(iter(plan.classes.values())),
        verdict=plan.target.verdict.how,
        why=plan.target.verdict.reason,
        gamma=None if plan.drafter is None else plan.drafter.gamma,
        vendor_gamma=None if plan.drafter is None else plan.drafter.vendor_gamma,
        weight_bytes=plan.memory.weights,
        kv_bytes=plan.memory.kv,
        kv_bytes_per_token=plan.kv_cache.bytes_per_token,
        context_one=plan.context.one,
        context_64=plan.context.all,
        refused=[refusal.replace(f"{folder}/", "") for refusal in plan.refusals],
    )


def _plan(folder: Path, model: str, draft: str | None, device: Device, ranks: int) -> PlanResult:
    shared = () if ranks == 1 else ("--tensor-parallel-size", str(ranks))
    path = None if draft is None else str(folder / draft)
    return describe_plan(
        make_plan(EngineConfig(str(folder / model), draft=path, extra_args=shared), device, planned=True)
    )


def format_matrix(matrix: ReleaseMatrix) -> str:
    """Format a table of the longest context, and one of what is refused, as Markdown."""
    rows: dict[tuple[str, str | None], list[MatrixCell]] = {}
    for cell in matrix.cells:
        rows.setdefault((cell.model, cell.draft), []).append(cell)
    heads = ["model", "draft", "γ", *matrix.devices]
    table = Table(
        "l" * len(heads),
        heads,
        [
            [model, draft or "", str(cells[0].gamma or ""), *map(_format_cell, cells)]
            for (model, draft), cells in rows.items()
        ],
    )
    reasons = sorted({_shorten(refusal) for cell in matrix.cells for refusal in cell.refused})
    lines = [
        "# Releases × devices",
        "",
        f"`{matrix.command}`; worked out from the releases' configs, not measured.  A cell is the longest context",
        "of one sequence, with 64 sequences admitted (`--max-num-seqs`); `N×` the least number of such GPUs (tensor",
        "parallel, 1, 2, 4 or 8); * weights stored small and computed in bf16; – not served: the reasons are below.",
        "",
        table.to_markdown(),
        "",
        "Not served because:",
        "",
        *(f"- {reason}" for reason in reasons),
    ]
    return "\n".join(lines) + "\n"


def _format_cell(cell: MatrixCell) -> str:
    if not cell.served:
        return "–"
    ranks = "" if cell.devices == 1 else f"{cell.devices}× "
    mark = "*" if cell.verdict == "weight-only" else ""
    return f"{ranks}{cell.context_one:,}{mark}"


def _shorten(refusal: str) -> str:
    """Without the numbers and names that differ from cell to cell."""
    if refusal.startswith("memory of "):
        return "memory: eight of the device have too little for the weights"
    return re.sub(r"^Laguna-\S+: ", "", refusal)


if __name__ == "__main__":
    raise SystemExit(main())
