"""`laguna quantise`: the releases' FP8 layout, and back; FP8 dense students through `laguna unpad` and `laguna pad`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compact_cases import config, fuse, read_tensors, weights, write_base
from compact_cases import quantise as quantise_release

from laguna_serve.plugins.formats.fp8 import dequantise_blocks, quantise_atoms, quantise_blocks
from laguna_serve.scripts.checkpoints import compact, quantise, unpad
from laguna_serve.serving.checkpoint import read_target

TESTS = Path(__file__).resolve().parents[2]
RELEASE = TESTS / "fixtures" / "releases" / "Laguna-XS.2-FP8"


def run(capsys: pytest.CaptureFixture[str], main: Any, *flags: object) -> tuple[int, dict[str, Any], str]:
    code = main([str(flag) for flag in flags])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, said.err


def name_parts(names: Any) -> set[str]:
    """Tensor names without the numbers of layers and experts, and with ranges' choices apart."""
    return {re.sub(r"\d+", "N", name) for name in names}


@pytest.mark.parametrize("shards", [1, 4])
def test_layout_is_the_release_s(tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int) -> None:
    cfg = config(hidden=160, width=144)
    tensors = weights(cfg)
    write_base(tmp_path / "base", cfg, tensors, shards)
    code, result, _ = run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")
    assert code == 0
    made = read_tensors(tmp_path / "fp8")
    published = json.loads((RELEASE / "tensors.json").read_text())
    expanded: dict[str, str] = {}
    for pattern, (dtype, _) in published.items():
        plain = re.sub(r"\{[\d,-]+\}", "N", pattern)
        choice = re.search(r"\{(.*?)\}", plain)
        for word in choice[1].split(",") if choice else [""]:
            expanded[re.sub(r"\d+", "N", re.sub(r"\{.*?\}", word, plain))] = dtype
    assert name_parts(made) == set(expanded)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}  # biases as in this base
    assert all(tensor.dtype == dtypes[expanded[re.sub(r"\d+", "N", name)]] for name, tensor in made.items())
    assert result["bytes_after"] == sum(tensor.nbytes for tensor in made.values())
    released = json.loads((RELEASE / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "fp8" / "config.json").read_text()) == cfg | {
        "quantization_config": released | {"transform_config": {}}
    }

    for to, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert run(capsys, quantise.main, tmp_path / "fp8", "--to", to, "--out", tmp_path / to)[0] == 0
        plain = read_tensors(tmp_path / to)
        assert plain.keys() == tensors.keys()
        for name, tensor in plain.items():
            exact = tensors[name].float()
            if f"{name}_scale" in made:
                rows, columns = (np.arange(size) // 128 for size in tensor.shape)
                exact = made[name].float() * made[f"{name}_scale"].float()[rows][:, columns]
                assert ((exact - tensors[name].float()).abs().max() / tensors[name].abs().max()) < 2**-4
            assert torch.equal(tensor, exact.to(dtype)), name
        assert "quantization_config" not in json.loads((tmp_path / to / "config.json").read_text())


def test_a_router_s_bias_in_fp32_keeps_its_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    tensors = weights(cfg)
    biases = {name for name in tensors if name.endswith("e_score_correction_bias")}
    assert biases
    tensors |= {name: torch.linspace(-0.1, 0.1, tensors[name].numel()) for name in biases}
    write_base(tmp_path / "base", cfg, tensors)
    for source, to in (("base", "fp8"), ("fp8", "bf16")):
        code, result, _ = run(capsys, quantise.main, tmp_path / source, "--to", to, "--out", tmp_path / to)
        made = read_tensors(tmp_path / to)
        assert code == 0
        assert result["bytes_after"] == sum(tensor.nbytes for tensor in made.values())
        assert all(made[name].dtype == torch.float32 and torch.equal(made[name], tensors[name]) for name in biases)


def test_rotated_weights_are_said_to_be_when_they_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their scales go, what they were rotated by stays in them: a drafter must be one for such a model."""
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    assert run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")[0] == 0
    path = tmp_path / "fp8" / "config.json"
    described = json.loads(path.read_text())
    groups = {"R1": {"apply": [{"location": "weight_output", "targets": ["re:.*embed_tokens$"]}]}}
    described["quantization_config"]["transform_config"] = {"config_groups": groups}
    path.write_text(json.dumps(described))
    assert run(capsys, quantise.main, tmp_path / "fp8", "--to", "bf16", "--out", tmp_path / "bf16")[0] == 0
    assert read_target(tmp_path / "bf16").rotated
    assert not read_target(tmp_path / "base").rotated


def test_values_next_to_nothing_are_no_nan() -> None:
    """Scales of bf16 have no number that small: as zero it made NaN of every zero beside them."""
    tiny = torch.zeros(130, 130)
    tiny[:64] = 1e-39
    for matrix in (quantise_blocks(tiny), quantise_atoms(tiny.T)):
        assert matrix.values.float().isfinite().all()
        assert matrix.require_scale().float().gt(0).all()


def test_what_cannot_be_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg))
    assert run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")[0] == 0
    for source, to, said in (
        ("base", "bf16", "expected fp8 weights for --to bf16, got others"),
        ("fp8", "fp8", "expected plain weights for --to fp8, got others"),
        (RELEASE.parent / "Laguna-XS.2-NVFP4", "bf16", "got NVFP4 (nvfp4-pack-quantized)"),
    ):
        code, _, error = run(capsys, quantise.main, tmp_path / source, "--to", to, "--out", tmp_path / "other")
        assert code == 2
        assert said in error
        assert not (tmp_path / "other").exists()


def make_student(folder: Path, widths: tuple[int, ...], stored: int = 384) -> Path:
    """A padded dense student in FP8, its blocks' scales in the padding other than 1."""
    cfg = config(hidden=160, layers=len(widths))
    cfg |= {"mlp_layer_types": ["dense"] * len(widths), "intermediate_size": stored, "tie_word_embeddings": False}
    tensors = weights(cfg)
    for layer, width in enumerate(widths):
        prefix = f"model.layers.{layer}.mlp"
        for name in ("gate", "up"):
            tensors[f"{prefix}.{name}_proj.weight"][width:] = 0
        tensors[f"{prefix}.down_proj.weight"][:, width:] = 0
        tensors[f"{prefix}.up_proj.weight"][3] = 0  # of one part alone, or inside: it stays
    write_base(folder / "plain", cfg, tensors)
    quantise.quantise(quantise.QuantiseConfig(source=str(folder / "plain"), to="fp8", out=folder / "student"))
    return folder / "student"


def test_fp8_student_is_cut_with_its_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Widths that are a multiple of 128, that end inside a block, and a layer without padding."""
    widths = (256, 200, 384)
    student = make_student(tmp_path, widths)
    code, result, _ = run(capsys, unpad.main, student, "--out", tmp_path / "cut", "--verify")
    assert (code, result["widths"], result["verified"]) == (0, list(widths), True)
    before, after = read_tensors(student), read_tensors(tmp_path / "cut")
    for layer, width in enumerate(widths):
        prefix, blocks = f"model.layers.{layer}.mlp", -(-width // 128)
        for name in ("gate", "up"):
            assert after[f"{prefix}.{name}_proj.weight"].shape == (width, 160)
            scale = before[f"{prefix}.{name}_proj.weight_scale"]
            assert torch.equal(after[f"{prefix}.{name}_proj.weight_scale"], scale[:blocks])
        assert after[f"{prefix}.down_proj.weight"].shape == (160, width)
        scale = before[f"{prefix}.down_proj.weight_scale"]
        assert torch.equal(after[f"{prefix}.down_proj.weight_scale"], scale[:, :blocks])
    saved = sum(tensor.nbytes for tensor in before.values()) - sum(tensor.nbytes for tensor in after.values())
    assert result["bytes_saved"] == saved
    assert run(capsys, _pad, tmp_path / "cut", "--out", tmp_path / "again", "--verify")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (student / name).read_bytes()


def _pad(argv: list[str]) -> int:
    return unpad.main(argv, tool="pad")


def test_packed_student_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = make_student(tmp_path, (256,))
    described = json.loads((student / "config.json").read_text())
    packed = json.loads((RELEASE.parent / "Laguna-XS.2-INT4" / "config.json").read_text())["quantization_config"]
    (student / "config.json").write_text(json.dumps(described | {"quantization_config": packed}))
    code, _, error = run(capsys, unpad.main, student, "--out", tmp_path / "cut")
    assert code == 2
    assert "expected plain layers or FP8 ones in blocks of 128×128, got INT4" in error


def test_dtype_is_said_under_every_name_that_the_source_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With both, transformers reads `dtype`, which stayed as it was; so did `compression_config`."""
    cfg = config(hidden=160, width=144)
    write_base(tmp_path / "base", cfg, weights(cfg))
    assert run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")[0] == 0
    stated = json.loads((tmp_path / "fp8" / "config.json").read_text())
    both = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "compression_config": stated.pop("quantization_config")}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(stated | both))
    assert run(capsys, quantise.main, tmp_path / "fp8", "--to", "fp32", "--out", tmp_path / "out")[0] == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["dtype"], made["torch_dtype"], "compression_config" in made) == ("float32", "float32", False)


def test_link_that_leads_nowhere_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer of a pruned cache was left out without a word."""
    cfg = config(hidden=160, width=144)
    write_base(tmp_path / "base", cfg, weights(cfg))
    (tmp_path / "base" / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "base" / "tokenizer_config.json").symlink_to("../blobs/gone")
    code, _, said = run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")
    assert (code, (tmp_path / "fp8").exists()) == (2, False)
    assert "tokenizer_config.json: expected a file, got a link that leads nowhere; fetch it again" in said


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_under_other_names_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    cfg = config(hidden=160, width=144)
    write_base(tmp_path / "base", cfg, weights(cfg))
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / name)
    code, _, said = run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--dry-run")
    assert code == 2
    assert f"expected model.safetensors or model.safetensors.index.json, got neither, but {name}; fetch " in said


def test_a_layers_experts_in_one_tensor_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would stay plain beside a config that says FP8."""
    cfg = config(hidden=160, width=144)
    write_base(tmp_path / "base", cfg, fuse(cfg, weights(cfg)))
    flags = (tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")
    code, _, said = run(capsys, quantise.main, *flags)
    assert code == 2
    assert "expected a matrix for each expert, got all of a layer's in model.layers.1.mlp.experts" in said


FIRST = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize("scale", [(3, 3), (2, 1), (1,), (1, 3), None])
@pytest.mark.parametrize("name", [FIRST, "model.layers.1.self_attn.q_proj.weight"])
def test_scales_that_are_not_one_a_block_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, scale: tuple[int, ...] | None
) -> None:
    cfg, tensors = quantise_all(config(hidden=160, width=144))
    tensors[name] = torch.ones(tensors[name].shape).to(torch.float8_e4m3fn)
    tensors.pop(f"{name}_scale", None)
    if scale is not None:
        tensors[f"{name}_scale"] = torch.ones(scale).bfloat16()
    write_base(tmp_path / "fp8", cfg, tensors)
    code, _, said = run(capsys, quantise.main, tmp_path / "fp8", "--to", "bf16", "--out", tmp_path / "bf16")
    assert code == 2
    assert f"expected {name}_scale of [1, 2], one for each 128×128 block of" in said
    mask = ("--random-mask", "0", "--block-size", 16, "--out", tmp_path / "cut")
    code, _, said = run(capsys, compact.main, tmp_path / "fp8", *mask)
    assert (code, f"expected {name}_scale of [1, 2]" in said) == (2, True)


def quantise_all(cfg: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return quantise_release(cfg, weights(cfg))


@pytest.mark.parametrize("plain", ["shared_expert", r"layers\.1\."])
def test_layers_that_a_recipe_left_plain_stay_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: str
) -> None:
    cfg, tensors = quantise_all(config(hidden=160, width=144))
    for name in [name for name in tensors if re.search(plain, name) and name.endswith("weight_scale")]:
        matrix = name.removesuffix("_scale")
        tensors[matrix] = tensors[matrix].bfloat16()
        del tensors[name]
    cfg["quantization_config"] = cfg["quantization_config"] | {
        "ignore": [*cfg["quantization_config"]["ignore"], f"re:.*{plain}.*"]
    }
    write_base(tmp_path / "fp8", cfg, tensors)
    assert run(capsys, quantise.main, tmp_path / "fp8", "--to", "fp32", "--out", tmp_path / "plain")[0] == 0
    made = read_tensors(tmp_path / "plain")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            scale = tensors.get(f"{name}_scale")
            expected = tensor.float() if scale is None else dequantise_blocks(tensor, scale)
            assert torch.equal(made[name].float(), expected), name


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_value_that_is_not_finite_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    """It would take its whole block with it."""
    cfg = config(hidden=160, width=144)
    tensors = weights(cfg)
    tensors[FIRST][3, 5] = value
    write_base(tmp_path / "base", cfg, tensors)
    code, _, said = run(capsys, quantise.main, tmp_path / "base", "--to", "fp8", "--out", tmp_path / "fp8")
    assert code == 2
    assert f"{FIRST}: expected finite values, got NaN or infinity" in said


@pytest.mark.parametrize("ignore", [[1], ["re:("], "lm_head", {"a": 1}])
def test_modules_to_ignore_that_are_none_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ignore: Any
) -> None:
    cfg, tensors = quantise_all(config(hidden=160, width=144))
    cfg["quantization_config"] = cfg["quantization_config"] | {"ignore": ignore}
    write_base(tmp_path / "fp8", cfg, tensors)
    for main, flags in ((quantise.main, ("--to", "bf16")), (compact.main, ("--random-mask", "0", "--block-size", 16))):
        code, _, said = run(capsys, main, tmp_path / "fp8", *flags, "--out", tmp_path / "out")
        assert code == 2
        assert "expected quantization_config.ignore to be a list of modules, got" in said
