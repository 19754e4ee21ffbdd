"""A mask of any share is the one that score_experts.py would write; the toy family's text can be had as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laguna_serve.scripts import pruning_mask, toy_text
from laguna_serve.scripts.text import corpus

MASKS = Path(__file__).resolve().parents[2] / "toy" / "masks"
SCORES = MASKS / "group_scores_importance_sorted.npy"


@pytest.mark.parametrize("percent", [10, 25, 40])
def test_mask_is_the_committed_one(tmp_path: Path, percent: int) -> None:
    assert pruning_mask.main([str(SCORES), "--share", str(percent / 100), "--out", str(tmp_path / "m.npy")]) == 0
    assert (tmp_path / "m.npy").read_bytes() == (MASKS / f"group_keep_mask_{percent}pct.npy").read_bytes()


def test_mask_of_another_share_lies_between(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pruning_mask.main([str(SCORES), "--share", "0.2", "--out", str(tmp_path / "m.npy")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pruned_groups"] == 128
    keep = np.load(tmp_path / "m.npy")
    assert (keep <= np.load(MASKS / "group_keep_mask_10pct.npy")).all()
    assert (keep >= np.load(MASKS / "group_keep_mask_25pct.npy")).all()


@pytest.mark.parametrize(
    ("scores", "share", "message"),
    [
        (np.ones((2, 2), np.float32), "0.2", "expected float scores [layers, experts, groups], got float32 [2, 2]"),
        (np.ones((1, 2, 4), np.float32), "1.5", "--share: expected at least 0 and less than 1, got 1.5"),
        (
            np.ones((1, 2, 4), np.float32),
            "0.9",
            "--share: expected at most 0.75 with one group kept in every expert, got 0.9",
        ),
        (np.full((1, 2, 4), 1e300), "0.2", "expected finite float32 scores, got 8 that are not"),
        (np.ones((2, 0, 4), np.float32), "0.2", "expected float scores [layers, experts, groups], got float32 [2, 0"),
        (None, "0.2", "expected a NumPy file, got none"),
        (b"PK\x03\x04 half an archive", "0.2", "expected a NumPy file (.npy), got one that cannot be read"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', ", "0.2", "expected a NumPy file (.npy), got one that cannot"),
        (
            b"\x93NUMPY\x01\x00\x46\x00%-70b"
            % b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 99999, 99)}",
            "0.2",
            "expected a NumPy file (.npy), got one that cannot be read",
        ),
    ],
)
def test_bad_scores_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scores: Any, share: str, message: str
) -> None:
    if isinstance(scores, bytes):
        (tmp_path / "s.npy").write_bytes(scores)
    elif scores is not None:
        np.save(tmp_path / "s.npy", scores)
    status = pruning_mask.main([str(tmp_path / "s.npy"), "--share", share, "--out", str(tmp_path / "m.npy")])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "m.npy").exists()


def test_scores_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.npy"
    np.save(path, np.ones((1, 2, 4), np.float32))
    before = path.read_bytes()
    assert pruning_mask.main([str(path), "--share", "0.2", "--out", f"{tmp_path}/../{tmp_path.name}/s.npy"]) == 2
    assert "--out: expected another file than the scores" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "held_out"), [([], True), (["--training"], False)])
def test_toys_text_is_one_half_of_its_corpus(tmp_path: Path, flags: list[str], held_out: bool) -> None:
    assert toy_text.main([*flags, "--out", str(tmp_path / "t.jsonl")]) == 0
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    wanted = [module.text for module in corpus.read_modules() if module.held_out == held_out]
    assert [json.loads(line)["text"] for line in lines] == wanted


@pytest.mark.slow
def test_toys_prompts_are_from_its_half(tmp_path: Path) -> None:
    for half in ([], ["--training"]):
        assert toy_text.main([*half, "--prompts", "40", "--out", str(tmp_path / "p.jsonl")]) == 0
        prompts = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
        modules = {module.name: module for module in corpus.read_modules()}
        assert len({prompt["prompt"] for prompt in prompts}) == 40
        for prompt in prompts:
            module = modules[prompt["id"].rpartition(":")[0]]
            assert prompt["prompt"] in module.text
            assert module.held_out != bool(half)


@pytest.mark.parametrize(("count", "message"), [("0", "expected 1 or more"), ("999999", "as many as there are")])
def test_toys_prompts_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str, message: str
) -> None:
    assert toy_text.main(["--prompts", count, "--out", str(tmp_path / "p.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_toys_text_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy_text.main(["--prompts", "1", "--out", str(tmp_path)]) == 2
    assert "expected a file, got a folder; name a file in it" in capsys.readouterr().err
