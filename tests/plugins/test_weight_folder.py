"""New weights from a folder: an update equals a restart, and one that fails changes nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.vllm

TOY = Path(__file__).resolve().parent.parent / "toy"
PROMPTS = 8
TEACHER, DRAFTER, SPECULATORS = TOY / "teacher", TOY / "dflash", TOY / "dflash-speculators"
Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def copy_changed(source: Path, folder: Path, noise: float) -> Path:
    """A whole checkpoint whose weights are others."""
    shutil.copytree(source, folder)
    torch.manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    changed = {
        name: tensor * (1 + noise * torch.randn(tensor.shape)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def new_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_changed(TEACHER, tmp_path_factory.mktemp("new") / "teacher", noise=0.05)


@pytest.fixture(scope="module")
def new_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_changed(DRAFTER, tmp_path_factory.mktemp("new") / "dflash", noise=0.5)


def drop_one(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.2.self_attn.k_proj.weight")}


def poison_one(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if name.endswith("experts.3.up_proj.weight"))
    spoilt = tensors[name].clone()
    spoilt[-1, -1] = torch.inf
    return {**tensors, name: spoilt}


def misshape_one(tensors: Tensors) -> Tensors:
    return {**tensors, "model.norm.weight": tensors["model.norm.weight"][:-1]}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, new_teacher: Path) -> dict[str, dict[str, Any]]:
    """Updates that must be refused, by what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    tensors = load_file(new_teacher / "model.safetensors")
    data = (new_teacher / "model.safetensors").read_bytes()
    (root / "cut").mkdir()
    (root / "cut" / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])
    folders: dict[str, tuple[Path, str]] = {
        "cut off": (root / "cut", "expected a whole safetensors file"),
        "a tensor is missing": (write(root / "few", drop_one(tensors)), "expected finite values for all of"),
        "a value is not finite": (write(root / "inf", poison_one(tensors)), "expected finite values for all of"),
        "a tensor is too short": (write(root / "short", misshape_one(tensors)), ""),
        "no folder": (root / "none", "expected a folder of safetensors"),
        "another model's": (DRAFTER, ""),
    }
    found = {what: {"update": {"folder": str(folder)}, "says": says} for what, (folder, says) in folders.items()}
    digest = {"model.safetensors": "0" * 64}
    found["not what was digested"] = {"update": {"folder": str(new_teacher), "sha256": digest}, "says": "SHA-256"}
    return found


def speculate(drafter: Path) -> dict[str, Any]:
    return {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 7}


def test_update_equals_a_restart_and_a_failed_one_changes_nothing(
    run_model: Callable[..., dict[str, Any]],
    new_teacher: Path,
    new_drafter: Path,
    broken: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Compiled, with a drafter: the weights that the graphs know, those that are packed aside and the fused ones."""
    # Both engines start from one path, as what vLLM compiles it keeps by path.
    start = shutil.copytree(TEACHER, tmp_path / "teacher")
    # A CPU packs bfloat16 alone; a GPU rounds it by the number of rows, which a drafter decides: near ties fall.
    dtype = "float32" if torch.cuda.is_available() else "bfloat16"
    settings = {"dtype": dtype, "enforce_eager": False, "prompts": PROMPTS}
    digest = {"model.safetensors": hashlib.sha256((new_teacher / "model.safetensors").read_bytes()).hexdigest()}
    updates = [
        {"folder": str(TEACHER)},
        {"folder": str(DRAFTER), "draft": True},
        *(item["update"] for item in broken.values()),
        {"folder": str(new_drafter), "draft": True},
        {"folder": str(new_teacher), "sha256": digest},
        {"folder": str(DRAFTER), "draft": True},
        {"folder": str(TEACHER)},
    ]
    drafter = shutil.copytree(DRAFTER, tmp_path / "dflash")
    report = run_model(start, **settings, speculative_config=speculate(drafter), updates=updates)
    shutil.copytree(new_teacher, start, dirs_exist_ok=True)
    shutil.copytree(new_drafter, drafter, dirs_exist_ok=True)
    fresh = run_model(start, **settings, speculative_config=speculate(drafter), updates=[{"folder": ""}])
    before, accepted = report["tokens"], report["accepted"]
    same, same_draft, *refused, new_draft, new, _, restored = report["updates"]
    assert same == same_draft == {"refused": None, "tokens": before}
    for (what, item), outcome in zip(broken.items(), refused, strict=True):
        assert outcome["refused"] is not None, what
        assert item["says"] in outcome["refused"], what
        assert outcome["tokens"] == before, what
    assert new_draft == {"refused": None, "tokens": before}, "a drafter does not decide what is said"
    assert new["refused"] is None
    assert new["tokens"] != before
    assert new["tokens"] == fresh["tokens"]
    assert restored == {"refused": None, "tokens": before}
    # What is drafted depends on every weight of the drafter and on the hidden states of the target.
    quiet, drafter_changed, both_changed = (
        accepted[: 3 + len(broken)],
        accepted[3 + len(broken)],
        accepted[4 + len(broken)],
    )
    assert len(set(quiet)) == 1
    assert drafter_changed < quiet[0] / 2
    assert both_changed == fresh["accepted"][0]
    assert accepted[-1] == quiet[0]
    start_digests, *digests = report["digests"]
    *quiet_digests, new_draft_digests, new_digests, _, restored_digests = digests
    assert quiet_digests == [start_digests] * (2 + len(broken))
    assert new_draft_digests["model"] == start_digests["model"]
    assert new_draft_digests["draft"] != start_digests["draft"]
    assert new_digests == fresh["digests"][0] != start_digests
    assert restored_digests == start_digests


def test_dense_student_and_speculators_drafter_take_new_weights(
    run_model: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    dense, drafter = TOY / "dense", copy_changed(SPECULATORS, tmp_path / "drafter", noise=0.5)
    new_dense = copy_changed(dense, tmp_path / "dense", noise=0.05)
    settings = {"hf_overrides": {"architectures": ["LagunaDenseForCausalLM"]}, "prompts": PROMPTS}
    updates = [
        {"folder": str(drafter), "draft": True},
        {"folder": str(new_dense)},
        {"folder": str(SPECULATORS), "draft": True},
        {"folder": str(dense)},
    ]
    report = run_model(dense, **settings, speculative_config=speculate(SPECULATORS), updates=updates)
    fresh = run_model(new_dense, **settings)
    assert [update["refused"] for update in report["updates"]] == [None] * 4
    assert report["updates"][1]["tokens"] == report["updates"][2]["tokens"] == fresh["tokens"] != report["tokens"]
    assert report["updates"][3]["tokens"] == report["tokens"]
    assert report["accepted"][1] < report["accepted"][0] / 2
    assert report["accepted"][-1] == report["accepted"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="experts are packed for a CPU alone")
def test_stock_experts_are_packed_once(run_model: Callable[..., dict[str, Any]]) -> None:
    """When this fails, vLLM packs the experts again by itself: retire `process_experts` of models/laguna_cpu.py."""
    stock = run_model(TEACHER, unmended="process_experts", reload=[str(TEACHER)], prompts=PROMPTS)
    assert stock["tokens_after_reload"] != [stock["tokens"]]


def test_files_are_found_and_read(tmp_path: Path) -> None:
    from laguna_serve.plugins.weight_folder import FolderUpdateInfo, WeightFolderError, find_files, read_files

    write(tmp_path / "v", {"a": torch.ones(2)})
    save_file({"b": torch.zeros(3)}, tmp_path / "v" / "more.safetensors")
    files = find_files(FolderUpdateInfo(str(tmp_path / "v")))
    assert {name: tensor.numel() for name, tensor in read_files(files, {})} == {"a": 2, "b": 3}
    save_file({"a": torch.zeros(3)}, tmp_path / "v" / "more.safetensors")
    with pytest.raises(WeightFolderError, match="a again"):
        list(read_files(files, {}))
    digests = {"model.safetensors": hashlib.sha256((tmp_path / "v" / "model.safetensors").read_bytes()).hexdigest()}
    named = find_files(FolderUpdateInfo(str(tmp_path / "v"), digests))
    assert [name for name, _ in read_files(named, digests)] == ["a"], "only the files that are named"


@pytest.mark.parametrize("name", ["../v/model.safetensors", "other.safetensors"])
def test_file_that_is_not_in_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    from laguna_serve.plugins.weight_folder import FolderUpdateInfo, WeightFolderError, find_files

    write(tmp_path / "v", {"a": torch.ones(2)})
    with pytest.raises(WeightFolderError, match="expected the file"):
        find_files(FolderUpdateInfo(str(tmp_path / "v"), {name: "0" * 64}))
