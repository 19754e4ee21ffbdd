"""`laguna compact` of FP8 bases: the same payload, each atom's own scales; and plain bases rounded to FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compact_cases import config, quantise, read_tensors, weights, write_base, write_masks
from safetensors.torch import load_file, save_file

from laguna_serve.scripts.checkpoints import compact

RELEASES = Path(__file__).resolve().parents[2] / "fixtures" / "releases"
DOCS = Path(__file__).resolve().parents[3] / "docs"
# Neither the hidden size nor the experts' width is a multiple of 128.
H, N, B = 160, 144, 16
COLUMNS = torch.arange(H) // 128


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON of the last line, and what was said on stderr."""
    code = compact.main([str(flag) for flag in flags])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, said.err


def make_base(folder: Path, shards: int = 1) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """An FP8 base in `folder / "base"`: its config, its tensors, and the flags of a mask."""
    cfg = config(hidden=H, width=N)
    cfg, tensors = quantise(cfg, weights(cfg))
    write_base(folder / "base", cfg, tensors, shards)
    return cfg, tensors, write_masks(folder, cfg, block=B)


def bits(tensor: torch.Tensor) -> list[int]:
    flat: list[int] = tensor.contiguous().view(torch.uint8).flatten().tolist()
    return flat


@pytest.mark.parametrize("shards", [1, 5])
def test_atoms_keep_their_payload_and_get_their_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int
) -> None:
    _, tensors, flags = make_base(tmp_path, shards)
    code, result, _ = run(capsys, tmp_path / "base", *flags, "--out", tmp_path / "out", "--verify")
    assert code == 0
    assert result["format"] == "fp8"
    assert max(result["verify"]["max_relative_error"]) < 1e-5
    made = read_tensors(tmp_path / "out")
    keep, indices = np.load(tmp_path / "keep.npy"), np.load(tmp_path / "indices.npy")
    for layer in range(2):
        prefix = f"model.layers.{layer + 1}.mlp.experts"
        w13, w2 = (made.pop(f"{prefix}.{name}_blocks") for name in ("w13", "w2"))
        s13, s2 = (made.pop(f"{prefix}.{name}_scales") for name in ("w13", "w2"))
        assert made.pop(f"{prefix}.block_start")[-1] == len(w2)
        assert w13.dtype == w2.dtype == torch.float8_e4m3fn
        assert (s13.dtype, s13.shape, s2.shape) == (torch.bfloat16, (len(w2), 2, B, 2), (len(w2), B, 2))
        for block, (expert, group) in enumerate(np.argwhere(keep[layer])):
            matrices = [tensors[f"{prefix}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            scales = [tensors[f"{prefix}.{expert}.{name}_proj.weight_scale"] for name in ("gate", "up", "down")]
            for row, atom in enumerate(indices[layer, expert, group].tolist()):
                for part in (0, 1):
                    assert bits(w13[block, part, row]) == bits(matrices[part][atom])
                    assert torch.equal(s13[block, part, row], scales[part][atom // 128])
                assert bits(w2[block, row]) == bits(matrices[2][:, atom])
                assert torch.equal(s2[block, row], scales[2][:, atom // 128])
                # What the weights are, by both definitions.
                got = w2[block, row].float() * s2[block, row].float()[COLUMNS]
                assert torch.equal(got, matrices[2][:, atom].float() * scales[2][:, atom // 128].float()[COLUMNS])
    passed = {name: t for name, t in tensors.items() if ".experts." not in name or name.endswith("bias")}
    assert made.keys() == passed.keys()
    assert all(bits(made[name]) == bits(passed[name]) for name in passed)


def test_description_and_sizes_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, tensors, flags = make_base(tmp_path)
    dry = run(capsys, tmp_path / "base", *flags, "--dry-run")[1]
    _, result, _ = run(capsys, tmp_path / "base", *flags, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == cfg["quantization_config"]
    assert written["expert_pruning"]["format"] == "fp8"
    made = read_tensors(tmp_path / "out")
    assert result["bytes_before"] == sum(t.nbytes for t in tensors.values())
    assert result["bytes_after"] == sum(t.nbytes for t in made.values())
    assert result["expert_bytes"] == sum(t.nbytes for name, t in made.items() if name.endswith("_blocks"))
    assert result["scale_bytes"] == sum(t.nbytes for name, t in made.items() if name.endswith("_scales"))
    assert result["parameters_before"] == sum(t.numel() for n, t in tensors.items() if not n.endswith("_scale"))
    assert {key: dry[key] for key in dry.keys() & result.keys() - {"status", "out", "verify"}} == {
        key: result[key] for key in dry.keys() & result.keys() - {"status", "out", "verify"}
    }
    assert len(dry["room"]) == 2


def test_config_alone_says_the_same_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, flags = make_base(tmp_path)
    counted = run(capsys, tmp_path / "base", *flags, "--dry-run")[1]
    (tmp_path / "base" / "model.safetensors").unlink()
    estimated = run(capsys, tmp_path / "base", *flags, "--dry-run")[1]
    for key in ("parameters_before", "parameters_after", "bytes_saved", "expert_bytes", "scale_bytes", "held_bytes"):
        assert estimated[key] == counted[key], key
    # Selection biases are fp32 in the releases, and here not.
    assert estimated["bytes_after"] == pytest.approx(counted["bytes_after"], abs=100)


def test_zeroed_form_has_zeros_and_the_base_s_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors, flags = make_base(tmp_path, shards=3)
    assert run(capsys, tmp_path / "base", *flags, "--out", tmp_path / "out", "--zeroed", "--verify")[0] == 0
    keep, indices = np.load(tmp_path / "keep.npy"), np.load(tmp_path / "indices.npy")
    for layer, expert, group in np.argwhere(~keep):
        prefix = f"model.layers.{layer + 1}.mlp.experts.{expert}"
        for atom in indices[layer, expert, group]:
            for name in ("gate", "up"):
                tensors[f"{prefix}.{name}_proj.weight"][atom] = 0
            tensors[f"{prefix}.down_proj.weight"][:, atom] = 0
    made = read_tensors(tmp_path / "out")
    assert made.keys() == tensors.keys()
    assert all(bits(made[name]) == bits(tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["w2_blocks", "w13_scales"])
def test_verify_finds_a_changed_value(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    _, _, flags = make_base(tmp_path)
    command = [tmp_path / "base", *flags, "--out", tmp_path / "out", "--verify"]
    assert run(capsys, *command)[0] == 0
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    changed = tensors[f"model.layers.2.mlp.experts.{name}"]
    changed[0] = (changed[0].float() * 2).to(changed.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    code, result, _ = run(capsys, *command)
    assert code == 1
    assert result["verify"]["max_relative_error"][0] < 1e-5 < result["verify"]["max_relative_error"][1]


def test_same_command_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, flags = make_base(tmp_path, shards=3)
    command = [tmp_path / "base", *flags, "--out", tmp_path / "out"]
    assert run(capsys, *command)[0] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    lost.unlink()
    assert run(capsys, *command)[1]["status"] == "written"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_plain_experts_are_rounded_atom_by_atom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest value of every 128 columns becomes e4m3's largest; the error stays below half a unit."""
    cfg = config(hidden=H, width=N)
    tensors = weights(cfg)
    # Rows of very different sizes share a block's scale, and not an atom's.
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() == 2:
            atoms = 1 if "down" in name else 0
            sizes = torch.logspace(-4, 0, tensor.shape[atoms], base=10)
            tensor.mul_(sizes[None] if atoms else sizes[:, None])
    write_base(tmp_path / "base", cfg, tensors)
    flags = write_masks(tmp_path, cfg, block=B)
    out = tmp_path / "out"
    code, result, _ = run(capsys, tmp_path / "base", *flags, "--to", "fp8", "--out", out, "--verify")
    assert code == 0
    assert 0 < result["rounding"]["atoms"] < 0.04 < 2**-4
    assert result["rounding"]["atoms"] <= result["rounding"]["blocks"]
    described = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in described
    assert described["expert_pruning"]["format"] == "fp8"
    made, keep, indices = read_tensors(out), np.load(tmp_path / "keep.npy"), np.load(tmp_path / "indices.npy")
    expert, group = np.argwhere(keep[0])[0]
    prefix = "model.layers.1.mlp.experts"
    for row, atom in enumerate(indices[0, expert, group]):
        wanted = tensors[f"{prefix}.{expert}.up_proj.weight"][atom].float()
        values, scales = (
            made[f"{prefix}.w13_blocks"][0, 1, row].float(),
            made[f"{prefix}.w13_scales"][0, 1, row].float(),
        )
        assert float(values[:128].abs().max()) == float(values[128:].abs().max()) == 448
        got = values * scales[COLUMNS]
        assert ((got - wanted).abs() <= wanted.abs() * 2**-4 + scales[COLUMNS] * 2**-10).all()
    _, again, _ = run(capsys, tmp_path / "base", *flags, "--to", "fp8", "--out", out)
    assert again["status"] == "already complete"
    code, _, error = run(capsys, tmp_path / "base", *flags, "--out", out)
    assert code == 2
    assert "expected to 'fp8' as begun" in error


def test_full_size_arithmetic_is_the_documented_one(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/pruning.md, from the release's config: there are no weights here."""
    code = compact.main([str(RELEASES / "Laguna-XS.2-FP8"), "--random-mask", "0.25", "--dry-run"])
    said = capsys.readouterr().out
    assert code == 0
    assert "32.884 GiB → 25.911 GiB" in said
    assert "26.254 GiB" in said
    assert "NVIDIA L40S: 13.6 GiB for the KV cache: 5 × 131,072 tokens" in said
    assert "NVIDIA H100 80GB: 44.8 GiB for the KV cache: 17 × 131,072 tokens" in said
    result = json.loads(said.splitlines()[-1])
    atoms = 39 * 256 * 512 * 3 // 4
    assert result["expert_bytes"] == atoms * 3 * 2048
    assert result["scale_bytes"] == atoms * 3 * 16 * 2


@pytest.mark.slow
def test_documented_table_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Of docs/pruning.md: each share of XS.2 in FP8, and beside it in bf16."""
    tables = []
    for release in ("Laguna-XS.2-FP8", "Laguna-XS.2"):
        code, result, _ = run(capsys, RELEASES / release, "--shares", "0,0.1,0.25,0.4", "--dry-run")
        assert (code, result["schema"], result["blocks"]) == (0, "laguna_serve.compact_shares/1", 79872)
        tables.append(result["shares"])
    page = (DOCS / "pruning.md").read_text()
    for fp8, plain in zip(*tables, strict=True):
        small, large = (room["sequences"] for room in fp8["room"])
        sizes = [f"{size / 2**30:.1f}" for size in (fp8["bytes"], fp8["held_bytes"], plain["held_bytes"])]
        name = "0%, compact" if fp8["share"] == 0 else f"{fp8['share']:.0%}"
        cells = [name, *sizes[:2], str(small), str(large), sizes[2], str(plain["room"][1]["sequences"])]
        assert f"| {' | '.join(cells)} |" in page


def test_shares_are_those_of_single_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(tmp_path)
    base, sizes = tmp_path / "base", ["--block-size", B]
    code, table, _ = run(capsys, base, "--shares", "0,0.5", *sizes, "--dry-run")
    assert code == 0
    for share in table["shares"]:
        single = run(capsys, base, "--random-mask", share["share"], *sizes, "--dry-run")[1]
        assert (share["bytes"], share["held_bytes"]) == (single["bytes_after"], single["held_bytes"])
        assert (share["blocks_pruned"], share["room"]) == (single["blocks_pruned"], single["room"])
    assert table["released_bytes"] == single["bytes_before"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shares", "0.1"], "--shares: expected --dry-run and no --zeroed"),
        (
            ["--shares", "0.1", "--random-mask", "0.2", "--dry-run"],
            "--shares: expected no other mask, got --random-mask",
        ),
        (["--shares", "0.1,x", "--dry-run"], "--shares: expected a finite number, got 'x'"),
    ],
)
def test_unfit_shares_are_refused(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        compact.main([str(RELEASES / "Laguna-XS.2-FP8"), *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_shares_that_no_mask_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, RELEASES / "Laguna-XS.2-FP8", "--shares", "0.1,1.5", "--dry-run")
    assert code == 2
    assert "ratio: expected at least 0 and less than 1, got 1.5" in error


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (
            "Laguna-XS.2-NVFP4",
            "got NVFP4 (nvfp4-pack-quantized): its down projections pack neighbouring atoms into bytes",
        ),
        ("Laguna-XS.2-INT4", "got INT4 (pack-quantized): its down projections pack"),
    ],
)
def test_packed_releases_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], release: str, said: str
) -> None:
    """By the config alone: there are no weights here."""
    code, _, error = run(capsys, RELEASES / release, "--random-mask", "0.1", "--out", tmp_path / "out")
    assert code == 2
    assert said in error
    assert "serve this one whole, with its drafter" in error
    assert len(error.splitlines()) == 1


def change_weights(cfg: dict[str, Any], **changes: Any) -> None:
    cfg["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes


BASES: dict[str, tuple[Any, str]] = {
    "other blocks": (lambda c, _t: change_weights(c, block_structure=[64, 64]), "block_structure [64, 64]"),
    "a scale per row": (
        lambda c, _t: change_weights(c, block_structure=None, strategy="channel"),
        "strategy 'channel', block_structure None",
    ),
    "integers": (lambda c, _t: change_weights(c, type="int"), "'float-quantized'"),
    "another method": (lambda c, _t: c["quantization_config"].update(quant_method="fp8"), "of method 'fp8'"),
    "no scales": (
        lambda _c, t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight_scale"),
        "up_proj.weight_scale, got n",
    ),
    "short scales": (
        lambda _c, t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight_scale": torch.ones(1, 2)}),
        "[2, 2], got [1, 2]",
    ),
    "plain experts": (
        lambda _c, t: t.update({k: v.bfloat16() for k, v in t.items() if v.dtype == torch.float8_e4m3fn}),
        "in F8_E4M3, got BF16",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_fp8_base_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, said = BASES[case]
    cfg = config(hidden=H, width=N)
    cfg, tensors = quantise(cfg, weights(cfg))
    change(cfg, tensors)
    write_base(tmp_path / "base", cfg, tensors)
    code, _, error = run(capsys, tmp_path / "base", "--random-mask", "0.1", "--out", tmp_path / "out")
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_in_fp8_is_not_rounded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(tmp_path)
    flags = ["--random-mask", "0.1", "--to", "fp8", "--out", tmp_path / "out"]
    code, _, error = run(capsys, tmp_path / "base", *flags)
    assert code == 2
    assert "expected plain weights for --to fp8, got FP8; leave --to out" in error
    with pytest.raises(SystemExit):
        run(capsys, tmp_path / "base", *flags, "--zeroed")
    assert "--zeroed: expected the base's own numbers, got --to fp8" in capsys.readouterr().err
