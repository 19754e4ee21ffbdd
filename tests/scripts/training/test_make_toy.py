"""The whole of make_toy.py on a few steps: every stage runs, and a second run has nothing left to do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from warm import run_warm

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_toy.py"


def make_toy(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    where = ["--out", str(folder / "toy"), "--work", str(folder / "work")]
    return run_warm(SCRIPT, *where, *flags, timeout=580, engines=True)


@pytest.mark.vllm
def test_smoke_run_makes_a_family_and_is_not_repeated(tmp_path: Path) -> None:
    first = make_toy(tmp_path, "--smoke")
    assert first.returncode == 0, first.stderr[-3000:]
    assert json.loads(first.stdout.splitlines()[-1])["stages"]["continuations"]["prompts"] == 64
    made = {p.relative_to(tmp_path / "toy").as_posix() for p in (tmp_path / "toy").rglob("*.*")}
    assert {f"{name}/model.safetensors" for name in ("teacher", "dflash", "dflash-speculators")} <= made
    assert {"prompts.jsonl", "MANIFEST.json"} <= made

    again = make_toy(tmp_path, "--smoke")
    assert again.returncode == 0
    assert [f"make_toy: {stage} is done" for stage in ("teacher", "continuations", "dflash", "dflash-speculators")] == [
        line for line in again.stderr.splitlines() if line.startswith("make_toy: ")
    ]

    other = make_toy(tmp_path, "--smoke", "--seed", "1")
    assert other.returncode == 2
    assert "--fresh" in other.stderr
