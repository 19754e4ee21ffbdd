"""Every published release on every GPU that can be planned for: what runs, with how much context, and why not.

    python bench/release_matrix.py

writes bench/results/release-matrix.json and .md from the releases' configs (tests/fixtures/releases); nothing is
started, and nothing of this machine enters but the version of the code.  Memory is worked out and not measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from laguna_serve.serving.kit.cli import Parser
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.devices import GPUS, plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.result import describe_plan

SCHEMA = "laguna_serve.release_matrix/1"
ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / "tests" / "fixtures" / "releases"
COMMAND = "python bench/release_matrix.py"
# Large enough for any release, so that what is refused is refused for its numbers.
CPU = Device("cpu", "CPU with AVX-512 and AMX, 1 TiB", 1 << 40, 1 << 40, isa=("avx512f", "amx_tile"))
MOST_RANKS = 8


def list_pairs(folder: Path) -> list[tuple[str, str | None]]:
    """Every model alone, and with the drafter that is published for it."""
    names = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
    drafters = [name for name in names if "dflash" in name.lower()]
    pairs: list[tuple[str, str | None]] = []
    for name in names:
        if name in drafters:
            continue
        family = re.sub(r"-(FP8|NVFP4|INT4)$", "", name)
        wanted = (name.replace(family, f"{family}-DFlash"), f"{family}-speculator.dflash")
        draft = next((drafter for drafter in wanted if drafter in drafters), None)
        pairs += [(name, None)] if draft is None else [(name, None), (name, draft)]
    return pairs


def plan_cell(folder: Path, model: str, draft: str | None, device: Device) -> dict[str, Any]:
    """The plan on one device, or on as few of them as serve it; the fields that the table shows."""
    ranks = 1
    while True:
        shared = () if ranks == 1 else ("--tensor-parallel-size", str(ranks))
        path = None if draft is None else str(folder / draft)
        plan = make_plan(EngineConfig(str(folder / model), draft=path, extra_args=shared), device, planned=True)
        found = to_json(describe_plan(plan))
        if found["ok"] or device.kind == "cpu" or ranks == MOST_RANKS or found["target"]["verdict"]["how"] == "refused":
            break
        ranks *= 2
    target, drafter = found["target"], found["drafter"]
    return {
        "model": model,
        "draft": draft,
        "device": device.name,
        "devices": ranks,
        "served": found["ok"],
        "class": next(iter(found["classes"].values())),
        "verdict": target["verdict"]["how"],
        "why": target["verdict"]["reason"],
        "gamma": None if drafter is None else drafter["gamma"],
        "vendor_gamma": None if drafter is None else drafter["vendor_gamma"],
        "weight_bytes": found["memory"]["weights"],
        "kv_bytes": found["memory"]["kv"],
        "kv_bytes_per_token": found["kv_cache"]["bytes_per_token"],
        "context_one": found["context"]["one"],
        "context_64": found["context"]["all"],
        "refused": [refusal.replace(f"{folder}/", "") for refusal in found["refusals"]],
    }


def make_matrix(folder: Path) -> dict[str, Any]:
    """Every pair on every device."""
    devices = {**{name: plan_for(name) for name in GPUS}, "cpu": CPU}
    cells = [
        {"as_device": name, **plan_cell(folder, model, draft, device)}
        for model, draft in list_pairs(folder)
        for name, device in devices.items()
    ]
    return {"schema": SCHEMA, "command": COMMAND, "devices": list(devices), "cells": cells}


def format_matrix(matrix: dict[str, Any]) -> str:
    """A table of the longest context, and one of what is refused, as Markdown."""
    devices = matrix["devices"]
    lines = [
        "# Releases × devices",
        "",
        f"`{matrix['command']}`; worked out from the releases' configs, not measured.  A cell is the longest context",
        "of one sequence, with 64 sequences admitted (`--max-num-seqs`); `N×` the least number of such GPUs (tensor",
        "parallel, 1, 2, 4 or 8); * weights stored small and computed in bf16; – not served: the reasons are below.",
        "",
        f"| model | draft | γ | {' | '.join(devices)} |",
        f"|---|---|---|{'---|' * len(devices)}",
    ]
    rows: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for cell in matrix["cells"]:
        rows.setdefault((cell["model"], cell["draft"]), []).append(cell)
    for (model, draft), cells in rows.items():
        gamma = cells[0]["gamma"] or ""
        lines.append(f"| {model} | {draft or ''} | {gamma} | {' | '.join(map(_format_cell, cells))} |")
    reasons = sorted({_shorten(refusal) for cell in matrix["cells"] for refusal in cell["refused"]})
    lines += ["", "Not served because:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def _format_cell(cell: dict[str, Any]) -> str:
    if not cell["served"]:
        return "–"
    ranks = "" if cell["devices"] == 1 else f"{cell['devices']}× "
    mark = "*" if cell["verdict"] == "weight-only" else ""
    return f"{ranks}{cell['context_one']:,}{mark}"


def _shorten(refusal: str) -> str:
    """Without the numbers and names that differ from cell to cell."""
    if refusal.startswith("memory of "):
        return "memory: eight of the device have too little for the weights"
    return re.sub(r"^Laguna-\S+: ", "", refusal)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--releases", type=Path, default=RELEASES, help="folder of folders with a config.json")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    args = parser.parse_args()
    matrix = make_matrix(args.releases)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "release-matrix.json").write_text(json.dumps(matrix, indent=1) + "\n", encoding="utf-8")
    (args.out / "release-matrix.md").write_text(format_matrix(matrix), encoding="utf-8")
    served = sum(cell["served"] for cell in matrix["cells"])
    print(json.dumps({"cells": len(matrix["cells"]), "served": served, "out": str(args.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
