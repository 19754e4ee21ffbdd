"""`laguna compact` on wrong input: one line that names it, exit status 2, and not a byte written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compact_cases import config, weights, write_base, write_masks
from safetensors.torch import save_file

from laguna_serve.scripts.checkpoints import compact
from laguna_serve.scripts.checkpoints import output as output_module

QUERIES = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def refuse(capsys: pytest.CaptureFixture[str], out: Path, *flags: object) -> str:
    """The one line that the command says when it refuses."""
    try:
        code = compact.main([str(flag) for flag in [*flags, "--out", out]])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("laguna: error: ")
    assert ": expected " in said.err
    assert ", got " in said.err
    assert not out.exists() or not any(out.iterdir()), "not a byte before everything is checked"
    return said.err


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def change_config(**changes: Any) -> Change:
    return lambda cfg, _tensors: cfg.update(changes)


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _cfg, tensors: tensors.update({name: change(tensors[name])})


BASES: dict[str, tuple[Change, str]] = {
    "another model": (change_config(model_type="llama"), "'llama'"),
    "no sparse layer": (change_config(mlp_layer_types=["dense"] * 3), "sparse layers"),
    "fp8 by its config": (change_config(quantization_config={"quant_method": "fp8"}), "'fp8'"),
    "already pruned": (change_config(expert_pruning={"block_size": 4}), "expert_pruning"),
    "scales": (lambda _c, t: t.update({f"{EXPERT}_scale": torch.ones(1)}), "weight_scale"),
    "fp8 by its tensors": (change_tensor(EXPERT, lambda t: t.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "fp8 elsewhere": (change_tensor(QUERIES, lambda t: t.to(torch.float8_e4m3fn)), QUERIES),
    "scales elsewhere": (lambda _c, t: t.update({f"{QUERIES}_scale_inv": torch.ones(1)}), "scale_inv"),
    "packed": (change_tensor(EXPERT, lambda t: t.to(torch.uint8)), "U8"),
    "int experts": (change_tensor(EXPERT, lambda t: t.to(torch.int32)), "I32"),
    "mixed dtypes": (change_tensor(EXPERT, lambda t: t.float()), "F32"),
    "missing tensor": (lambda _c, t: t.__delitem__(EXPERT), EXPERT),
    "wrong tensor shape": (change_tensor(EXPERT, lambda t: t[:-1].clone()), "[15, 8]"),
    "one expert more": (lambda _c, t: t.update({EXPERT.replace(".2.", ".4."): t[EXPERT].clone()}), "experts.4"),
    "both spellings": (
        lambda _c, t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 32, 8)}),
        "down_proj",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_base_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, said = BASES[case]
    cfg = config()
    tensors = weights(cfg)
    flags = write_masks(tmp_path, cfg)
    change(cfg, tensors)
    write_base(tmp_path / "base", cfg, tensors)
    assert said in refuse(capsys, tmp_path / "out", tmp_path / "base", *flags)


MASKS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "an expert loses everything": ("keep", lambda a: a & (np.arange(4) != 2)[:, None], "layer 1, expert 2"),
    "mask of another shape": ("keep", lambda a: a[:, :, :2], "[2, 4, 2]"),
    "mask of numbers": ("keep", lambda a: a.astype(np.uint8), "uint8"),
    "indices of another shape": ("indices", lambda a: a[:1], "[1, 4, 4, 4]"),
    "indices of another dtype": ("indices", lambda a: a.astype(np.int32), "int32"),
    "no permutation": ("indices", lambda a: np.zeros_like(a), "permutation"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, change, said = MASKS[case]
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    flags = write_masks(tmp_path, cfg)
    np.save(tmp_path / f"{name}.npy", change(np.load(tmp_path / f"{name}.npy")))
    assert said in refuse(capsys, tmp_path / "out", tmp_path / "base", *flags)


@pytest.mark.parametrize("name", ["keep", "indices"])
@pytest.mark.parametrize("content", [None, b"", b"not numpy"])
def test_mask_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    flags = write_masks(tmp_path, cfg)
    path = tmp_path / f"{name}.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refuse(capsys, tmp_path / "out", tmp_path / "base", *flags)
    if name == "indices":
        assert str(path) in refuse(capsys, tmp_path / "out", tmp_path / "base", "--random-mask", "0.1", *flags[2:])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--keep-mask", "m.npy"], "--group-indices"),
        (["--random-mask", "1.0"], "less than 1"),
        (["--random-mask", "-0.1"], "at least 0"),
        (["--random-mask", "0.9"], "at most 0.875"),
        (["--random-mask", "0.1", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--random-mask", "0.1", "--block-size", "3"], "divisor"),
        (["--random-mask", "0.1", "--block-size", "0"], "divisor"),
        (["--random-mask", "0.1", "--block-size", "4", "--group-indices", "i.npy"], "--block-size"),
        (["--keep-mask", "m.npy", "--group-indices", "i.npy", "--seed", "1"], "--seed"),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    assert said in refuse(capsys, tmp_path / "out", tmp_path / "base", *flags)


def test_base_that_is_not_there_or_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    base, out = write_base(tmp_path / "base", cfg, weights(cfg), shards=3), tmp_path / "out"
    flags = ["--random-mask", "0.1"]
    assert "neither" in refuse(capsys, out, tmp_path / "nowhere", *flags)
    assert "org/name" in refuse(capsys, out, "org/name", *flags)
    shard = base / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for cut in (len(whole) - 1, 100, 0):
        shard.write_bytes(whole[:cut])
        assert shard.name in refuse(capsys, out, base, *flags)
    shard.unlink()
    assert shard.name in refuse(capsys, out, base, *flags)
    shard.write_bytes(whole)
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(listed))
    assert "lm_head.weight" in refuse(capsys, out, base, *flags)
    index.write_text("{")
    assert "weight_map" in refuse(capsys, out, base, *flags)
    index.unlink()
    assert "neither" in refuse(capsys, out, base, *flags)
    (base / "config.json").unlink()
    assert "config.json" in refuse(capsys, out, base, *flags)


def test_output_inside_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    base = write_base(tmp_path / "base", cfg, weights(cfg))
    assert "outside the base" in refuse(capsys, base / "out", base, "--random-mask", "0.1")
    assert compact.main([str(base), "--random-mask", "0.1", "--out", str(base)]) == 2
    assert sorted(p.name for p in base.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_output_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    base, out = write_base(tmp_path / "base", cfg, weights(cfg)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert compact.main([str(base), "--random-mask", "0.1", "--out", str(out)]) == 2
    assert "other files" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    base = write_base(tmp_path / "base", cfg, weights(cfg))
    usage = type("Usage", (), {"free": 12_345})
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _path: usage)
    assert "got 12,345" in refuse(capsys, tmp_path / "out", base, "--random-mask", "0.1")


def test_config_and_weights_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not an error: the experts fit, and what is saved is counted in the files; but it is said."""
    cfg = config()
    tensors = weights(cfg)
    base = write_base(tmp_path / "base", cfg | {"vocab_size": 64}, tensors)
    save_file(tensors, base / "model.safetensors")
    assert compact.main([str(base), "--random-mask", "0.25", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "note" in said.err
    stored = sum(t.numel() for t in tensors.values())
    assert json.loads(said.out.splitlines()[-1])["parameters_before"] == stored
