"""`laguna unpad` and `laguna pad`: the round trip to the bit, what is refused, and what happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_cases import config, read_tensors, weights, write_base
from safetensors.torch import load_file, save_file

from laguna_serve.scripts.checkpoints import output as output_module
from laguna_serve.scripts.checkpoints import unpad

TOY = Path(__file__).resolve().parents[2] / "toy"
LAYERS, STORED = 4, 24
KEPT = {0: list(range(24)), 1: list(range(17)), 2: [*range(3, 9), 12, *range(20, 24)], 3: list(range(5))}
MLP = "model.layers.{}.mlp.{}_proj.weight"


def run(capsys: pytest.CaptureFixture[str], tool: str, *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = unpad.main([str(argument) for argument in arguments], tool=tool)
    lines = capsys.readouterr().out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}


def dense_config(**changes: Any) -> dict[str, Any]:
    return config(layers=LAYERS) | {"mlp_layer_types": ["dense"] * LAYERS, "tie_word_embeddings": False} | changes


def padded(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16, zero: float = 0.0) -> Path:
    """A dense checkpoint whose layers keep the units of `KEPT`."""
    cfg = dense_config()
    tensors = weights(cfg, dtype)
    for layer, kept in KEPT.items():
        gone = sorted(set(range(STORED)) - set(kept))
        for name in ("gate", "up"):
            tensors[MLP.format(layer, name)][gone] = zero
        tensors[MLP.format(layer, "down")][:, gone] = zero
    write_base(folder, cfg, tensors, shards)
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=2, ensure_ascii=False) + "\n")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_gives_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int, dtype: torch.dtype
) -> None:
    source = padded(tmp_path / "in", shards, dtype)
    code, result = run(capsys, "unpad", source, "--out", tmp_path / "trimmed", "--verify")
    assert code == 0
    assert result["widths"] == [24, 17, 11, 5]
    trimmed = read_tensors(tmp_path / "trimmed")
    before = read_tensors(source)
    for layer, kept in KEPT.items():
        for name in ("gate", "up"):
            assert torch.equal(trimmed[MLP.format(layer, name)], before[MLP.format(layer, name)][kept])
        assert torch.equal(trimmed[MLP.format(layer, "down")], before[MLP.format(layer, "down")][:, kept])
    assert result["parameters_after"] == sum(tensor.numel() for tensor in trimmed.values())
    assert result["bytes_saved"] == sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in trimmed.values())
    described = json.loads((tmp_path / "trimmed" / "config.json").read_text())
    assert described["architectures"] == ["LagunaDenseForCausalLM"]
    assert described["intermediate_size_per_layer"] == [24, 17, 11, 5]
    assert described["intermediate_size"] == STORED

    code, result = run(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "again", "--verify")
    assert code == 0
    for path in source.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_toy_student_makes_the_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((TOY / "dense" / "MANIFEST.json").read_text())
    code, result = run(capsys, "unpad", TOY / "dense", "--out", tmp_path / "trimmed")
    assert code == 0
    assert result["widths"] == manifest["widths"]
    assert (result["parameters_before"], result["parameters_after"]) == (
        manifest["parameters"]["stored"],
        manifest["parameters"]["true"],
    )
    assert run(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "again")[0] == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (TOY / "dense" / name).read_bytes(), name


def test_transformers_computes_the_same_of_what_was_padded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other engines load it."""
    from transformers import LagunaForCausalLM

    assert run(capsys, "unpad", TOY / "dense", "--out", tmp_path / "trimmed")[0] == 0
    assert run(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "again")[0] == 0
    ids = torch.arange(20)[None]
    logits = [LagunaForCausalLM.from_pretrained(f)(input_ids=ids).logits for f in (TOY / "dense", tmp_path / "again")]
    assert torch.equal(*logits)


def test_signs_of_zeros_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = padded(tmp_path / "in", zero=-0.0)
    code, result = run(capsys, "unpad", source, "--out", tmp_path / "trimmed", "--verify")
    assert code == 0
    assert result["widths"] == [24, 17, 11, 5]
    assert result["negative_zeros"] == 3 * 8 * (7 + 13 + 19)
    assert run(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "again")[0] == 0
    before, after = read_tensors(source), read_tensors(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layer_with_broken_padding_stays_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = padded(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors[MLP.format(1, "gate")][20, 3] = 1e-5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code = unpad.main([str(source), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 0
    assert "layer 1 is kept whole: unit 20 is zero in part only" in captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert result["widths"] == [24, 24, 11, 5]
    assert result["whole_layers"] == [1]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = padded(tmp_path / "in")
    assert unpad.main([str(source), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0: 24, 1: 17, 2: 11, 3: 5 of 24 units" in out
    assert json.loads(out.splitlines()[-1])["status"] == "dry run"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def refusal(capsys: pytest.CaptureFixture[str], tool: str, *arguments: Any) -> str:
    """The one line on stderr of a run that is refused."""
    assert unpad.main([str(argument) for argument in arguments], tool=tool) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "spelling",
    [
        {"num_experts": 0},
        {"mlp_only_layers": list(range(LAYERS)), "decoder_sparse_step": 1},
        {"decoder_sparse_step": 0},
        {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)], "mlp_only_layers": list(range(LAYERS))},
    ],
    ids=["num_experts", "mlp_only_layers", "decoder_sparse_step", "contradicted"],
)
def test_dense_in_any_spelling_is_unpadded_and_padded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: dict[str, Any]
) -> None:
    source = padded(tmp_path / "in")
    change_config(source, **{"mlp_layer_types": None, **spelling})
    code, result = run(capsys, "unpad", source, "--out", tmp_path / "trimmed", "--verify")
    assert (code, result["widths"]) == (0, [24, 17, 11, 5])
    assert run(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "again", "--verify")[0] == 0
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "again"))
    assert after == before


def test_what_cannot_be_unpadded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    source = padded(tmp_path / "in")
    assert run(capsys, "unpad", source, "--out", tmp_path / "trimmed")[0] == 0
    assert "got an unpadded checkpoint" in refusal(capsys, "unpad", tmp_path / "trimmed", "--out", out)
    assert "expected intermediate_size_per_layer in config.json" in refusal(capsys, "pad", source, "--out", out)
    assert "expected a Laguna of dense layers alone" in refusal(capsys, "unpad", TOY / "teacher", "--out", out)
    assert "expected a folder outside the base" in refusal(capsys, "unpad", source, "--out", source / "out")
    full = write_base(tmp_path / "full", dense_config(), weights(dense_config()))
    assert "expected padded layers, got none" in refusal(capsys, "unpad", full, "--out", out)
    change_config(source, quantization_config={"quant_method": "fp8"})
    assert "of method 'fp8'" in refusal(capsys, "unpad", source, "--out", out)
    change_config(source, quantization_config=None, intermediate_size=32)
    assert "expected 4 layers of intermediate_size 32" in refusal(capsys, "unpad", source, "--out", out)
    change_config(source, intermediate_size=STORED)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"packed": torch.zeros(4, dtype=torch.uint8)}, source / "model.safetensors")
    assert "got packed in U8; take the bf16" in refusal(capsys, "unpad", source, "--out", out)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    assert "expected a whole safetensors file" in refusal(capsys, "unpad", source, "--out", out)
    (source / "model.safetensors").unlink()
    assert "expected model.safetensors or" in refusal(capsys, "unpad", source, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size_per_layer": [24, 17, 11]}, "expected intermediate_size_per_layer to be 4 integers"),
        ({"intermediate_size_per_layer": [24, 16, 11, 5]}, "of 16 units as config.json says, got 17"),
        ({"unpadded_from": {"kept_units": {"2": [[0, 30]]}}}, "kept_units of layer 2 to be runs of 11 of 24 units"),
        ({"unpadded_from": {"kept_units": {"2": [[3, 9], [8, 13]]}}}, "kept_units of layer 2 to be runs of 11"),
        ({"unpadded_from": {"kept_units": {"2": "all"}}}, "kept_units of layer 2 to be runs of 11"),
        ({"unpadded_from": {"kept_units": {"2": [[-1, 10]]}}}, "kept_units of layer 2 to be runs of 11"),
    ],
)
def test_config_that_was_touched_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert run(capsys, "unpad", padded(tmp_path / "in"), "--out", tmp_path / "trimmed")[0] == 0
    change_config(tmp_path / "trimmed", **changes)
    assert message in refusal(capsys, "pad", tmp_path / "trimmed", "--out", tmp_path / "out")


def test_verify_sees_a_changed_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = padded(tmp_path / "in"), tmp_path / "out"
    assert run(capsys, "unpad", source, "--out", out)[0] == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][1] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, result = run(capsys, "unpad", source, "--out", out, "--verify")
    assert code == 1
    assert result["verified"] is False


def test_stopped_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    source, out = padded(tmp_path / "in", shards=3), tmp_path / "out"
    written: list[str] = []
    write_file = output_module.write_file

    def stop_at_second(path: Path, write: Any) -> None:
        if path.suffix == ".safetensors":
            written.append(path.name)
            if len(written) == 2:
                raise KeyboardInterrupt
        write_file(path, write)

    monkeypatch.setattr(output_module, "write_file", stop_at_second)
    assert unpad.main([str(source), "--out", str(out)]) == 130
    assert not (out / "config.json").exists(), "what has a config.json is whole"
    monkeypatch.undo()
    first = (out / written[0]).stat().st_mtime_ns
    assert run(capsys, "unpad", source, "--out", out, "--verify")[0] == 0
    assert (out / written[0]).stat().st_mtime_ns == first
    assert run(capsys, "unpad", source, "--out", out)[1]["status"] == "already complete"
    assert "tool 'unpad' as begun" not in capsys.readouterr().err


def test_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: Usage)
    assert "bytes free" in refusal(capsys, "unpad", padded(tmp_path / "in"), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unpad.main([str(padded(tmp_path / "in")), "--out", str(tmp_path / ("a" * 300))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("laguna: error: ")
    assert said.endswith(": File name too long\n")


def test_index_is_there_before_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(output_module.Output, "note", lambda _self, name: written.append(name))
    assert unpad.main([str(padded(tmp_path / "in", shards=3)), "--out", str(tmp_path / "out")]) == 0
    assert written[-2:] == ["model.safetensors.index.json", "config.json"]


def test_command_line(tmp_path: Path) -> None:
    """Through `laguna`, and ended by a signal like any other program."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli"]
    for tool in ("unpad", "pad"):
        done = subprocess.run([*command, tool, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"usage: laguna {tool} ")
        assert "examples:" in done.stdout
        done = subprocess.run([*command, tool, str(tmp_path)], capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "--out: expected a folder" in done.stderr
    source = padded(tmp_path / "in")
    done = subprocess.run(
        [*command, "unpad", str(source), "--out", str(tmp_path / "out")], capture_output=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "written"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
