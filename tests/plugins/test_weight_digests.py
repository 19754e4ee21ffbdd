"""Digests of served weights: one element of any tensor of a checkpoint changes them, wherever it was packed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"
Run = Callable[..., dict[str, Any]]


def change_one_of_each_kind(source: Path, folder: Path) -> list[Path]:
    """Whole versions of a checkpoint, each with one element changed, in the last tensor of every kind."""
    tensors = load_file(source / "model.safetensors")
    kinds = {re.sub(r"\d+", "N", name): name for name, tensor in tensors.items() if tensor.is_floating_point()}
    folders = []
    for kind, name in kinds.items():
        changed = tensors[name].clone()
        last = changed.view(-1)[-1]
        last.copy_(torch.where(last == 0, torch.ones_like(last), -last))
        (folder / kind).mkdir(parents=True)
        save_file({**tensors, name: changed}, folder / kind / "model.safetensors")
        folders.append(folder / kind)
    return folders


def count_digests(report: dict[str, Any], key: str, states: int) -> int:
    assert [update["refused"] for update in report["updates"]] == [None] * states
    digests = [found[key] for found in report["digests"]]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    return len(set(digests))


def test_every_tensor_of_model_and_drafter_counts(run_model: Run, tmp_path: Path) -> None:
    """In fp32, where oneDNN has the matrices of linear layers, and vLLM's own checksums are of nothing there."""
    model = change_one_of_each_kind(TOY / "teacher", tmp_path / "model")
    draft = change_one_of_each_kind(TOY / "dflash", tmp_path / "draft")
    updates = [{"folder": str(folder)} for folder in model]
    updates += [{"folder": str(TOY / "teacher")}, *({"folder": str(folder), "draft": True} for folder in draft)]
    speculation = {"method": "dflash", "model": str(TOY / "dflash"), "num_speculative_tokens": 7}
    report = run_model(TOY / "teacher", updates=updates, speculative_config=speculation, prompts=0)
    assert count_digests(report, "model", len(updates)) == len(model) + 1
    drafts = {found["draft"] for found in report["digests"][-1 - len(draft) :]}
    assert len(drafts) == len(draft) + 1
    projection = next(place for place, folder in enumerate(model) if folder.name.endswith("o_proj.weight"))
    # When this fails, vLLM reads what a CPU has packed: its /weight_checker will do.
    assert report["checksums"][0] == report["checksums"][1 + projection]


def test_every_tensor_of_a_pruned_model_counts(run_model: Run, make_checkpoint: Any, tmp_path: Path) -> None:
    pruned = shutil.copytree(make_checkpoint(25), tmp_path / "pruned")
    changed = change_one_of_each_kind(pruned, tmp_path / "changed")
    report = run_model(pruned, dtype="bfloat16", updates=[{"folder": str(each)} for each in changed], prompts=0)
    assert count_digests(report, "model", len(changed)) == len(changed) + 1
    assert {found["draft"] for found in report["digests"]} == {None}
