"""The insight plots' figures against arithmetic, which pictures are drawn, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laguna_serve.evals.harnesses.table import SuitesResult
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.insights.__main__ import InsightsConfig, InsightsResult, draw_insights, format_insights, main
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.results import read_result

ROOT = Path(__file__).resolve().parents[3]
MASKS = ROOT / "tests" / "toy" / "masks"
SUITES = ROOT / "bench" / "results" / "toy-suites" / "suites.json"


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Three layers of two experts: scores of 1, 0.1 and 0.01 in turn, an expert without a score, two masks."""
    folder = tmp_path / "artefacts"
    folder.mkdir()
    scores = np.stack([np.full((2, 8), 10.0**-layer, np.float32) for layer in range(3)])
    scores[1, 1] = 0
    np.save(folder / "atomic_scores.npy", scores)
    keep = np.ones((3, 2, 4), dtype=bool)
    keep[2, 0, 1:] = False
    np.save(folder / "group_keep_mask_25pct.npy", keep)
    np.save(folder / "group_keep_mask_random_25pct.npy", ~keep)
    keep[2, 0, 2:] = True
    np.save(folder / "group_keep_mask_10pct.npy", keep)
    return folder


@pytest.mark.slow
def test_figures_are_the_artefacts(artefacts: Path, tmp_path: Path) -> None:
    result = draw_insights(InsightsConfig(masks=artefacts, out=tmp_path / "out"))
    found = result.artefacts
    assert found is not None
    assert (found.ratios, found.atoms, found.groups, found.score) == ((0.1, 0.25), 48, 24, None)
    assert [layer.layer for layer in found.layers] == [1, 2, 3], "counted, where nothing says their numbers"
    assert [layer.quantiles[2] for layer in found.layers] == pytest.approx([0, -1, -2])
    assert [layer.unscored for layer in found.layers] == [0, 0.5, 0]
    assert [layer.pruned for layer in found.layers] == [(0, 0), (0, 0), (0.125, 0.375)]
    assert found.fall == pytest.approx(2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["insights.json", "layers.png", "scores.png"]
    assert read_result(tmp_path / "out" / "insights.json", InsightsResult) == result
    assert "12.5%" in format_insights(result)


@pytest.mark.slow
def test_layers_have_the_numbers_of_the_summary(artefacts: Path, tmp_path: Path) -> None:
    layers = [{"layer": number, "quantiles": [0, 0, 0, 0, 0], "mean": 0} for number in (2, 5, 7)]
    summary = {"schema": "laguna_serve.expert_summary/1", "model": "m", "score": "heapr", "sparse_layers": 3}
    summary |= {"experts": 2, "atoms": 8, "block_size": 2, "groups": 24, "group_parameters": 1, "routed_parameters": 24}
    (artefacts / "summary.json").write_text(json.dumps({**summary, "shares": [], "layers": layers}))
    found = draw_insights(InsightsConfig(masks=artefacts, out=tmp_path / "out")).artefacts
    assert found is not None
    assert ([layer.layer for layer in found.layers], found.score) == ([2, 5, 7], "heapr")


@pytest.mark.slow
def test_committed_artefacts_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--masks", str(MASKS), "--out", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    pruned = np.array([layer["pruned"] for layer in line["artefacts"]["layers"]])
    np.testing.assert_allclose(pruned.mean(0), (0.1, 0.25, 0.4))


def write_suite(path: Path, value: float, **settings: Any) -> str:
    """A suites.json of one model and one row."""
    table = json.loads(SUITES.read_text())
    row = table["rows"][0]
    row["cells"]["teacher"] |= {"value": value, "ci95": [value - 0.1, value + 0.05], "n": 100}
    row["cells"]["teacher"]["settings"] |= settings
    path.write_text(json.dumps({**table, "rows": [row]}))
    return str(path)


def test_benchmarks_are_placed_by_share(tmp_path: Path) -> None:
    files = [f"0={write_suite(tmp_path / 'a', 0.9)}", f"0.25={write_suite(tmp_path / 'b', 0.6)}"]
    result = draw_insights(InsightsConfig(suites=tuple(reversed(files)), out=tmp_path / "out"))
    (curve,) = result.suites
    assert (curve.suite, curve.metric, curve.differ) == ("gsm8k", "exact_match,strict-match", ())
    assert [(point.ratio, point.value, point.ci95, point.n) for point in curve.points] == [
        (0, 0.9, (0.8, pytest.approx(0.95)), 100),
        (0.25, 0.6, (0.5, pytest.approx(0.65)), 100),
    ]
    assert result.pictures == ("suites.png",)
    assert (tmp_path / "out" / "suites.png").stat().st_size > 5000
    other = f"0.4={write_suite(tmp_path / 'c', 0.3, shots=0)}"
    (curve,) = draw_insights(InsightsConfig(suites=(*files, other), out=tmp_path / "out")).suites
    assert curve.differ == ("shots",)


def test_a_column_is_chosen_by_its_name(tmp_path: Path) -> None:
    table = json.loads(SUITES.read_text())
    row = table["rows"][0]
    row["cells"]["pruned"] = {**row["cells"]["teacher"], "value": 0.25}
    path = tmp_path / "both.json"
    path.write_text(json.dumps({**table, "columns": ["teacher", "pruned"], "rows": [row]}))
    assert read_result(path, SuitesResult).columns == ["teacher", "pruned"]
    given = (f"0={path}#teacher", f"0.1={path}#pruned")
    (curve,) = draw_insights(InsightsConfig(suites=given, out=tmp_path / "out")).suites
    assert [point.value for point in curve.points] == [0, 0.25]
    for wrong, message in (
        (f"0.1={path}", r"expected one model, or 0\.1=.*#COLUMN, got 2: teacher, pruned"),
        (f"0.1={path}#other", "expected a column of teacher, pruned, got other"),
    ):
        with pytest.raises(CommandError, match=message):
            draw_insights(InsightsConfig(suites=(wrong,), out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["suites.json"], "expected SHARE=FILE, a share from 0 to 1, got 'suites.json'"),
        (["1.5=x"], "expected SHARE=FILE, a share from 0 to 1"),
        (["0=/nowhere.json"], "expected a result file"),
        ([f"0={SUITES}", f"0.0={SUITES}"], "expected each share once"),
        ([f"0={SUITES}"], "expected a suite and metric that two files at least have, got none"),
    ],
)
def test_unfit_results_are_refused(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        draw_insights(InsightsConfig(suites=tuple(given), out=tmp_path / "out"))


def remove_masks(folder: Path) -> None:
    for path in folder.glob("group_keep_mask_*"):
        path.unlink()


def save(name: str, array: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "atomic_scores.npy").unlink(), "expected a NumPy file, got none"),
        (remove_masks, "expected group_keep_mask_10pct.npy or another mask, got none"),
        (save("atomic_scores.npy", np.zeros((3, 2))), r"expected float scores \[layers, experts, atoms\], got float64"),
        (save("atomic_scores.npy", np.full((3, 2, 8), np.nan)), "expected finite scores, got 48"),
        (save("group_keep_mask_25pct.npy", np.ones((3, 2, 8), bool)), r"expected a mask of shape \[3, 2, 4\]"),
        (save("group_keep_mask_10pct.npy", np.ones((2, 2, 4), bool)), r"expected a mask of shape \[3, 2, 4\]"),
        (save("group_keep_mask_10pct.npy", np.ones((3, 2, 4))), r"expected bool \[3, 2, groups\], got float64"),
    ],
)
def test_unfit_artefacts_are_refused(
    artefacts: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(artefacts)
    with pytest.raises(PruningError, match=message):
        draw_insights(InsightsConfig(masks=artefacts, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_something_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--masks or --suites: expected one of them at least"):
        InsightsConfig(out=tmp_path)
