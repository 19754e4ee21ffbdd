"""Scores, groups and masks: the formula against brute force, the formats, and the committed artefacts."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_laguna import make_tiny
from warm import run_warm

from laguna_serve.plugins.pruning import (
    ExpertShape,
    PruningError,
    check_pruning,
    draw_random_mask,
    rank_groups,
    read_shape,
)
from laguna_serve.scripts import score_experts
from laguna_serve.scripts.text.rows import read_rows
from laguna_serve.scripts.training.pruning.artefacts import choose_block_size
from laguna_serve.scripts.training.pruning.losses import mean_loss, zeroed
from laguna_serve.scripts.training.pruning.scores import group_atoms

ROOT = Path(__file__).resolve().parents[3]
MASKS = ROOT / "tests" / "toy" / "masks"
SCRIPT = ROOT / "scripts" / "score_experts.py"


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = make_tiny()
    return model, read_shape(model.config.to_dict(), "tiny")


def test_groups_are_sorted_and_keep_every_atom() -> None:
    scores = np.random.default_rng(0).random((2, 3, 12), dtype=np.float32)
    scores[0, 0] = 1.0  # ties keep their order
    indices, group_scores = group_atoms(scores, 4)
    assert (indices.dtype, indices.shape) == (np.int64, (2, 3, 3, 4))
    assert indices[0, 0].tolist() == np.arange(12).reshape(3, 4).tolist()
    ranked = np.take_along_axis(scores, indices.reshape(2, 3, 12), -1)
    assert (np.diff(ranked, axis=-1) <= 0).all()
    np.testing.assert_allclose(group_scores, ranked.reshape(2, 3, 3, 4).sum(-1), rtol=1e-6)
    assert (np.sort(indices.reshape(2, 3, 12), -1) == np.arange(12)).all()


def test_zeroing_is_undone_and_equals_pruned_atoms(tiny: Any) -> None:
    model, shape = tiny
    rows = [torch.arange(3, 40)]
    indices = np.tile(np.arange(8).reshape(4, 2)[::-1], (2, 4, 1, 1)).astype(np.int64)
    pruning = check_pruning(draw_random_mask(shape, 4, 0.5, 0), indices, shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = mean_loss(model, rows)
    with zeroed(model, shape, pruning):
        assert mean_loss(model, rows) != base
        weights = model.model.layers[1].mlp.experts
        for expert in range(4):
            gone = np.setdiff1d(np.arange(8), pruning.atoms(0, expert))
            assert not weights.down_proj[expert][:, gone].any()
            assert not weights.gate_up_proj[expert][gone].any()
            assert not weights.gate_up_proj[expert][gone + 8].any()
            assert weights.down_proj[expert].ne(0).any(0).sum() == pruning.atoms(0, expert).size
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_committed_masks_fit_the_teacher_and_their_manifest() -> None:
    shape = read_shape(json.loads((MASKS.parent / "teacher" / "config.json").read_text()), "toy")
    manifest = json.loads((MASKS / "MANIFEST.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MASKS.glob("*.npy")}
    assert manifest["sha256"] == files
    assert sum(path.stat().st_size for path in MASKS.iterdir()) < 400_000
    assert manifest["text"] == "toy:training", "never the text that the loss is measured on"
    arrays = {name.removesuffix(".npy"): np.load(MASKS / name) for name in files}
    indices, groups = group_atoms(arrays["atomic_scores"], 16)
    assert np.array_equal(indices, arrays["group_indices_importance_sorted"])
    assert np.array_equal(groups, arrays["group_scores_importance_sorted"])
    for percent in (10, 25, 40):
        keep = arrays[f"group_keep_mask_{percent}pct"]
        assert np.array_equal(keep, rank_groups(groups, percent / 100))
        for mask in (keep, arrays[f"group_keep_mask_random_{percent}pct"]):
            assert check_pruning(mask, indices, shape).pruned_blocks == 640 * percent // 100
            assert mask.any(-1).all()


def run_script(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return run_warm(SCRIPT, str(MASKS.parent / "teacher"), *map(str, flags))


@pytest.mark.slow
def test_command_plans_scores_and_summarises(tmp_path: Path) -> None:
    source = tmp_path / "chunks.npy"
    np.save(source, np.random.default_rng(0).integers(5, 500, (2, 48)))
    flags = ["--score", "heapr", "--text", source, "--dtype", "bfloat16", "--out", tmp_path / "out"]
    planned = run_script(*flags, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout.splitlines()[-1])
    assert plan["schema"] == "laguna_serve.expert_scoring_plan/1"
    assert (plan["rows"], plan["longest"], plan["dtype"]) == (2, 48, "bfloat16")
    assert plan["model_bytes"] > 3 * plan["part_bytes"]
    assert "GiB of memory besides Python" in planned.stdout
    assert not (tmp_path / "out").exists(), "a plan writes nothing"
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "MANIFEST.json").read_text())
    assert (manifest["score"], manifest["tokens"], manifest["dtype"]) == ("heapr", 96, "bfloat16")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["loss"] == manifest["loss"] > 0
    assert summary["group_parameters"] == 16 * 3 * 160
    assert summary["routed_parameters"] == 5 * 16 * 3 * 128 * 160
    for share, pruned in zip(summary["shares"], (64, 160, 256), strict=True):
        assert sum(share["pruned_groups_per_layer"]) == share["pruned_groups"] == pruned
        assert share["removable_bytes_bf16"] == 2 * pruned * summary["group_parameters"]
    page = (tmp_path / "out" / "native_group_pruning_stats.md").read_text()
    assert page.count("\n| ") == 7, "a row per sparse layer, the head and the sum"
    indices = np.load(tmp_path / "out" / "group_indices_importance_sorted.npy")
    keep = np.load(tmp_path / "out" / "group_keep_mask_25pct.npy")
    shape = read_shape(json.loads((MASKS.parent / "teacher" / "config.json").read_text()), "toy")
    assert check_pruning(keep, indices, shape).pruned_blocks == 160


def test_groups_of_which_40_percent_cannot_go_are_refused_before_the_work() -> None:
    shape = ExpertShape((1,), 2, 128, 16)
    assert choose_block_size(64, shape) == 64
    with pytest.raises(PruningError, match=r"--block-size: expected groups of which 40% can go.*got 128, of which 0%"):
        choose_block_size(128, shape)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--device", "cuda"], "expected a GPU that torch can use, got none"),
        (["--text", "missing.jsonl"], "missing.jsonl: expected a text file"),
        (["--dry-run", "--atomic-scores", "x.npy"], "--dry-run: expected scores to measure"),
        (["--score", "reap", "--atomic-scores", "x.npy"], "--score: expected none beside --atomic-scores"),
        (["--length", "8"], "--length: expected at least 16"),
    ],
)
@pytest.mark.slow
def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path, flags: list[str], why: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_script(*flags, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_models_own_folder_is_no_place_for_artefacts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It wrote masks and states beside the weights."""
    model = shutil.copytree(ROOT / "tests/toy/teacher", tmp_path / "model")
    before = sorted(model.iterdir())
    assert score_experts.main([str(model), "--score", "magnitude", "--out", f"{model}/../model"]) == 2
    assert "expected a folder for the artefacts, got the model's" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


@pytest.mark.slow
def test_somebody_elses_scores_are_grouped_and_ranked(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((5, 16, 128)).astype(np.float32)
    np.save(tmp_path / "theirs.npy", scores)
    flags = ["--block-size", "32", "--atomic-scores", tmp_path / "theirs.npy", "--out"]
    done = run_script(*flags, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["schema"] == "laguna_serve.expert_scores/1"
    assert np.load(tmp_path / "out" / "group_indices_importance_sorted.npy").shape == (5, 16, 4, 32)
    np.save(tmp_path / "theirs.npy", scores[:2])
    wrong = run_script(*flags, tmp_path / "none")
    assert wrong.returncode == 2
    assert "[2, 16, 128]" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_rows_are_evenly_spaced_and_never_cross_documents(tmp_path: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    lines = [{"text": "a" * 50}, {"prompt": "b" * 100}, {"text": "short"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_rows(str(tmp_path / "t.jsonl"), tokenizer, 32, 10_000)
    assert [(len(row), len(set(row.tolist()))) for row in rows.rows] == [(32, 1), (18, 1), (32, 1), (32, 1), (32, 1)]
    assert rows.targets == 146 - 5
    assert len(read_rows(str(tmp_path / "t.jsonl"), tokenizer, 32, 64).rows) == 2
    for name, content in (("no.jsonl", '{"x": 1}\n'), ("short.txt", "abc"), ("none.txt", None)):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(PruningError, match="expected"):
            read_rows(str(tmp_path / name), tokenizer, 32, 64)
