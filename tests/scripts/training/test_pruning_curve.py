"""The committed loss curve says what it should, and the script runs from one end to the other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from msgspec import structs
from warm import run_warm

from laguna_serve.scripts.training import figure
from laguna_serve.scripts.training.pruning.curve import CurveResult
from laguna_serve.scripts.training.pruning.plot import draw_curve
from laguna_serve.serving.kit.results import read_result

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
RESULT = ROOT / "bench" / "results" / "toy-pruning-loss"


def test_committed_curve_was_measured_with_the_committed_masks() -> None:
    result = json.loads((RESULT / "curve.json").read_text())
    assert result["schema"] == "laguna_serve.pruning_loss/1"
    assert result["text"]["source"] == "toy:held-out"
    for point in result["points"]:
        mask = TOY / "masks" / f"group_keep_mask_{point['ratio'] * 100:.0f}pct.npy"
        assert point["ranked_mask_sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest()
        assert len(point["random"]) >= 5
        assert result["unpruned"] < point["ranked"] < min(point["random"])


def test_a_mask_that_lowers_the_loss_is_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    style = figure.style_axes

    def look(axes: Axes, title: str, measure: str) -> None:
        style(axes, title, measure)
        seen.append(axes.get_ylim())

    monkeypatch.setattr(figure, "style_axes", look)
    result = read_result(RESULT / "curve.json", CurveResult)
    first, *others = result.points
    lower = structs.replace(first, ranked=result.unpruned - 0.05)
    for points in (result.points, (lower, *others)):
        draw_curve(structs.replace(result, points=points), tmp_path / "curve.png")
    assert seen[0][0] == 0
    assert seen[1][0] < -0.049


@pytest.mark.slow
def test_script_runs(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "pruning_curve.py"
    flags = ["--masks", str(TOY / "masks"), "--tokens", "384", "--seeds", "2", "--out", str(tmp_path)]
    done = run_warm(script, str(TOY / "teacher"), *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [point["pruned_groups"] for point in result["points"]] == [64, 160, 256]
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "curve.md", "curve.png"}
    wrong = run_warm(script, str(TOY / "teacher"), *flags, "--seeds", "1")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
