"""`laguna compact`: the right weights in the right order, whatever the base's spelling and shards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compact_cases import H, N, config, fuse, read_tensors, weights, write_base, write_masks

from laguna_serve.scripts.checkpoints import compact

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, dict[str, Any]]:
    """Exit status and the JSON of the last line."""
    code = compact.main([str(flag) for flag in flags])
    lines = capsys.readouterr().out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}


def expected_blocks(
    tensors: dict[str, torch.Tensor], masks: Path, index: int
) -> tuple[list[Any], list[Any], list[int]]:
    """Blocks of sparse layer `index`, copied row by row from the definition."""
    keep, indices = np.load(masks / "keep.npy"), np.load(masks / "indices.npy")
    w13, w2, start = [], [], [0]
    for expert in range(keep.shape[1]):
        prefix = f"model.layers.{index + 1}.mlp.experts.{expert}"
        gate, up, down = (tensors[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        for group in range(keep.shape[2]):
            if keep[index, expert, group]:
                atoms = indices[index, expert, group].tolist()
                w13.append(torch.stack([torch.stack([gate[a] for a in atoms]), torch.stack([up[a] for a in atoms])]))
                w2.append(torch.stack([down[:, a] for a in atoms]))
        start.append(len(w2))
    return w13, w2, start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("spelling", "shards"), [("each", 1), ("each", 5), ("fused", 1), ("fused", 3)])
def test_compact_checkpoint_is_the_definition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str, shards: int, dtype: torch.dtype
) -> None:
    cfg = config()
    tensors = weights(cfg, dtype)
    write_base(tmp_path / "base", cfg, fuse(cfg, tensors) if spelling == "fused" else tensors, shards)
    flags = write_masks(tmp_path, cfg)
    code, result = run(capsys, tmp_path / "base", *flags, "--out", tmp_path / "out", "--verify")
    assert code == 0
    assert result["schema"] == "laguna_serve.compact/1"
    assert max(result["verify"]["max_relative_error"]) < 1e-5

    made = read_tensors(tmp_path / "out")
    for index in range(2):
        w13, w2, start = expected_blocks(tensors, tmp_path, index)
        prefix = f"model.layers.{index + 1}.mlp.experts"
        assert torch.equal(made.pop(f"{prefix}.w13_blocks"), torch.stack(w13))
        assert torch.equal(made.pop(f"{prefix}.w2_blocks"), torch.stack(w2))
        starts = made.pop(f"{prefix}.block_start")
        assert starts.dtype == torch.int32
        assert starts.tolist() == start
    passed = {n: t for n, t in tensors.items() if ".experts." not in n or n.endswith("bias")}
    assert made.keys() == passed.keys(), "everything else passes through, under the published names"
    assert all(torch.equal(made[name], passed[name]) for name in passed)


def test_config_and_index_describe_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg), shards=5)
    flags = write_masks(tmp_path, cfg)
    _, result = run(capsys, tmp_path / "base", *flags, "--out", tmp_path / "out")
    out = tmp_path / "out"
    written = json.loads((out / "config.json").read_text())
    pruning = written.pop("expert_pruning")
    keep = np.load(tmp_path / "keep.npy")
    assert written == {**cfg, "architectures": ["LagunaSentinelForCausalLM"]}
    assert pruning["kept_blocks"] == keep.sum((1, 2)).tolist()
    assert (pruning["block_size"], pruning["blocks_per_expert"]) == (4, 4)
    assert pruning["source"]["base"] == "base"
    assert len(pruning["source"]["keep_mask_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(pruning), "no path of this machine"

    index = json.loads((out / "model.safetensors.index.json").read_text())
    made = read_tensors(out)
    assert list(index["weight_map"]) == sorted(made)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())
    assert {p.name for p in out.glob("*.safetensors")} == set(index["weight_map"].values())
    assert (out / "tokenizer.json").read_text() == "{}"
    starts = sum(t.numel() for n, t in made.items() if n.endswith("block_start"))
    assert result["parameters_after"] == sum(t.numel() for t in made.values()) - starts
    assert result["bytes_saved"] == int((~keep).sum()) * 4 * 3 * H * 2


@pytest.mark.parametrize(("spelling", "shards"), [("each", 5), ("fused", 1)])
def test_zeroed_form_changes_pruned_atoms_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str, shards: int
) -> None:
    cfg = config()
    tensors = weights(cfg)
    stored = fuse(cfg, tensors) if spelling == "fused" else tensors
    write_base(tmp_path / "base", cfg, stored, shards)
    flags = write_masks(tmp_path, cfg)
    out = tmp_path / "out"
    code, result = run(capsys, tmp_path / "base", *flags, "--out", out, "--zeroed", "--verify")
    assert code == 0
    assert result["mode"] == "zeroed"
    assert result["bytes_saved"] == 0
    assert result["parameters_after"] == result["parameters_before"]
    keep, indices = np.load(tmp_path / "keep.npy"), np.load(tmp_path / "indices.npy")
    for index, expert in np.ndindex(2, 4):
        prefix = f"model.layers.{index + 1}.mlp.experts.{expert}"
        for group in np.flatnonzero(~keep[index, expert]):
            for atom in indices[index, expert, group]:
                tensors[f"{prefix}.gate_proj.weight"][atom] = 0
                tensors[f"{prefix}.up_proj.weight"][atom] = 0
                tensors[f"{prefix}.down_proj.weight"][:, atom] = 0
    wanted, made = fuse(cfg, tensors) if spelling == "fused" else tensors, read_tensors(out)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    for path in (tmp_path / "base").glob("*.safetensors"):
        sizes = [len(file.read_bytes()) for file in (path, out / path.name)]
        assert sizes[0] == sizes[1]
    for path in (tmp_path / "base").glob("*.json"):
        assert (out / path.name).read_bytes() == path.read_bytes(), "stock config and index, byte for byte"


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [10, 25, 40])
def test_toy_teacher_with_its_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: int) -> None:
    masks = TOY / "masks"
    flags = ["--keep-mask", masks / f"group_keep_mask_{ratio}pct.npy"]
    flags += ["--group-indices", masks / "group_indices_importance_sorted.npy"]
    code, result = run(capsys, TOY / "teacher", *flags, "--out", tmp_path / "out", "--verify")
    assert code == 0
    assert result["blocks_pruned"] == 640 * ratio // 100
    assert result["parameters_before"] == 6_227_824


def test_dry_run_of_the_full_size_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(hidden=2048, width=512, experts=256, layers=40) | {"vocab_size": 100_352, "intermediate_size": 8192}
    cfg |= {"num_key_value_heads": 8, "head_dim": 128, "shared_expert_intermediate_size": 512}
    cfg |= {"num_attention_heads_per_layer": [48, 64, 64, 64] * 10, "gating": True}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    code = compact.main([str(tmp_path), "--random-mask", "0.1", "--dry-run"])
    out = capsys.readouterr().out
    assert code == 0
    assert "33,442,617,088 → 30,302,000,896" in out
    assert "5.850 GiB" in out
    assert "7,987 of 79,872" in out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"], "nothing is written"


def test_parameter_formula_agrees_with_transformers() -> None:
    from transformers import LagunaConfig, LagunaForCausalLM

    from laguna_serve.plugins.pruning import read_shape
    from laguna_serve.scripts.checkpoints.compaction.savings import count_parameters

    base = json.loads((TOY / "teacher" / "config.json").read_text())
    for changes in ({}, {"gating": "per-element"}, {"attention_bias": True}, {"tie_word_embeddings": True}):
        cfg = base | changes
        with torch.device("meta"):
            model = LagunaForCausalLM(LagunaConfig(**cfg))
        model.tie_weights()
        assert count_parameters(cfg, read_shape(cfg, "toy")) == sum(p.numel() for p in model.parameters()), changes


def test_random_mask_is_seeded_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    blocks = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--random-mask", "0.5", "--seed", seed, "--block-size", "2", "--out", tmp_path / out, "--verify"]
        code, result = run(capsys, tmp_path / "base", *flags)
        assert (code, result["blocks_pruned"]) == (0, 32)
        blocks.append(read_tensors(tmp_path / out)["model.layers.1.mlp.experts.w2_blocks"])
    assert torch.equal(blocks[0], blocks[1])
    assert blocks[0].shape != blocks[2].shape or not torch.equal(blocks[0], blocks[2])
    source = json.loads((tmp_path / "a" / "config.json").read_text())["expert_pruning"]["source"]
    assert source == {"base": "base", "random_ratio": 0.5, "seed": 1}


def test_random_mask_on_given_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    indices = write_masks(tmp_path, cfg)[2:]
    code, _ = run(capsys, tmp_path / "base", "--random-mask", "0.25", *indices, "--out", tmp_path / "out", "--verify")
    assert code == 0
    made = read_tensors(tmp_path / "out")["model.layers.1.mlp.experts.w2_blocks"]
    assert made.shape[1:] == (4, H)
    assert N == 16


@pytest.mark.parametrize("damage", ["blocks", "passed", "name"])
def test_verify_finds_a_changed_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    from safetensors.torch import load_file, save_file

    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    command = [tmp_path / "base", *write_masks(tmp_path, cfg), "--out", tmp_path / "out", "--verify"]
    assert run(capsys, *command)[0] == 0
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.experts.w2_blocks" if damage == "blocks" else "model.norm.weight"
    if damage == "name":
        tensors["model.morn.weight"] = tensors.pop(name)
    else:
        tensors[name][0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    code, result = run(capsys, *command)
    assert code == 1
    assert result["status"] == "already complete"
    assert not result["verify"]["held"]
    if damage == "blocks":
        assert result["verify"]["max_relative_error"][0] < 1e-5 < result["verify"]["max_relative_error"][1]
    else:
        assert ("model.morn.weight" if damage == "name" else name) in result["verify"]["difference"]


@pytest.mark.slow
def test_laguna_hands_the_command_to_the_tool(tmp_path: Path) -> None:
    laguna = [sys.executable, "-m", "laguna_serve.serving.cli", "compact"]
    shown = subprocess.run([*laguna, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--random-mask RATIO" in shown.stdout
    wrong = subprocess.run([*laguna, str(tmp_path), "--dry-run"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("laguna: error: ")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [(), ("--zeroed",)])
def test_blocks_that_no_kernel_takes_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    write_base(tmp_path / "base", cfg := config(), weights(cfg))
    command = [str(tmp_path / "base"), "--random-mask", "0.25", "--block-size", "4", "--dry-run", *flags]
    assert compact.main(command) == 0
    note = "what was cut from it cannot be served: expected blocks of a multiple of 16 atoms, got 4; "
    assert (note in capsys.readouterr().err) == (not flags)


@pytest.mark.parametrize("form", [(), ("--zeroed",), ("--to", "fp8")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_pruned_may_be_anything_and_what_is_kept_may_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: tuple[str, ...], value: float
) -> None:
    cfg = config()
    tensors, flags = weights(cfg), write_masks(tmp_path, cfg)
    keep, indices = np.load(tmp_path / "keep.npy"), np.load(tmp_path / "indices.npy")
    layer, expert = map(int, np.argwhere(~keep)[0][:2])
    prefix = f"model.layers.{layer + 1}.mlp.experts.{expert}"
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensor = tensors[f"{prefix}.{name}.weight"]
        rows = tensor.t() if name == "down_proj" else tensor
        rows[torch.from_numpy(indices[layer, expert][~keep[layer, expert]]).flatten()] = value
    write_base(tmp_path / "base", cfg, tensors)
    assert run(capsys, tmp_path / "base", *flags, *form, "--out", tmp_path / "out", "--verify")[0] == 0
    layer, expert, group = map(int, np.argwhere(keep)[0])
    tensors[f"model.layers.{layer + 1}.mlp.experts.{expert}.up_proj.weight"][indices[layer, expert, group, 0], 1] = (
        value
    )
    write_base(tmp_path / "base", cfg, tensors)
    code = compact.main([*map(str, (tmp_path / "base", *flags, *form, "--out", tmp_path / "other", "--verify"))])
    said = capsys.readouterr()
    assert code == (2 if form == ("--to", "fp8") else 1)
    assert re.search(r"expected finite .*, got NaN or infinity; repair the", said.out + said.err)
