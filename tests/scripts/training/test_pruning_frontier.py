"""The frontier's arithmetic, and the script from one end to the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from laguna_serve.scripts.frontier.result import compare_rows, correlate, rank

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"


def test_differences_are_paired_by_row() -> None:
    base = np.array([100.0, 900.0, 50.0, 450.0])
    targets = np.array([10, 100, 10, 100])
    delta, low, high = compare_rows(base + 0.01 * targets, base, targets)
    assert (delta, low, high) == pytest.approx((0.01, 0.01, 0.01))
    added = np.array([1.0, -1.0, 2.0, 0.5])
    delta, low, high = compare_rows(base + added, base, targets)
    assert delta == pytest.approx(added.sum() / 220)
    assert low < delta < high


def test_ranks_of_equal_values_are_shared() -> None:
    assert rank(np.array([3.0, 1.0, 3.0, 2.0], np.float32)).tolist() == [3.5, 1.0, 3.5, 2.0]
    values = np.random.default_rng(0).random((2, 3, 4), dtype=np.float32)
    found = correlate({"a": values, "b": values**3, "c": -values})
    assert found["a"] == {"a": 1.0, "b": 1.0, "c": -1.0}


@pytest.mark.slow
def test_script_measures_every_mask(tmp_path: Path) -> None:
    flags = ["--calibration-tokens", "384", "--tokens", "768", "--seeds", "1", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "scripts" / "frontier"), "--model", str(TOY / "teacher")]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "frontier.json").read_text())
    masks = ["loss", "heapr", "output", "reap", "magnitude", "loss-atoms", "heapr-atoms", "random-0"]
    assert [point["mask"] for point in result["points"]] == masks * 3
    for point, pruned in zip(result["points"], [64] * 8 + [160] * 8 + [256] * 8, strict=True):
        assert result["bytes_bf16"] - point["bytes_bf16"] == 2 * pruned * 16 * 3 * 160
    assert result["correlations"]["loss"]["heapr"] > 0.5
    assert "| heapr-atoms |" in (tmp_path / "frontier.md").read_text()
