"""`laguna drafter convert`: what carries over computes the same, in PyTorch and in vLLM; what does not is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm import run_warm

from laguna_serve.scripts.checkpoints import drafter as command
from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter

TOY = Path(__file__).resolve().parents[2] / "toy"
TEACHER = TOY / "teacher"
SHAPE = DrafterShape(
    vocab_size=512,
    hidden_size=160,
    target_layer_ids=(4,),
    mask_token_id=3,
    num_hidden_layers=2,
    intermediate_size=96,
    gated=False,
)


def make_laguna(folder: Path, **changes: Any) -> Path:
    """An untrained drafter that has a counterpart: one tap, no gate, a constant hidden norm, and norms that differ."""
    torch.manual_seed(0)
    drafter = LagunaDrafter(replace(SHAPE, **changes))
    for name, parameter in drafter.named_parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if "norm" in name else 2 * parameter.data
    drafter.hidden_norm.weight.data[:] = 0.75
    drafter.save(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TOY / "dflash" / file).read_bytes())
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    code = command.main([*map(str, arguments), "--target", str(TEACHER)])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, captured.err


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, or remove those that are None; a double underscore stands for a dot."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del found[key]
        else:
            found[key] = tensor
    save_file(found, folder / "model.safetensors")


def proposals(folder: Path) -> list[list[int]]:
    """Of the plain form on random states through the teacher's embedding and head."""
    shared = load_file(TEACHER / "model.safetensors")
    embedding, head = (shared[name].float() for name in ("model.embed_tokens.weight", "lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    drafter = (SpeculatorsDrafter if "speculators_model_type" in config else LagunaDrafter).load(folder)
    generator = torch.Generator().manual_seed(1)
    found = []
    for anchor in range(20):
        states = torch.randn(12, len(drafter.shape.target_layer_ids), 160, generator=generator)
        found.append(drafter.propose(anchor + 20, states, 7, embedding, head))
    return found


@pytest.mark.slow
def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_laguna(tmp_path / "laguna")
    code, result, _ = run(capsys, source, "--to", "speculators", "--out", tmp_path / "there")
    assert code == 0
    assert result["lost"] == {}
    assert result["difference"] < 0.03
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [5]
    assert config["draft_vocab_size"] == 512
    assert config["speculators_config"]["verifier"]["name_or_path"] == "teacher"
    code, result, _ = run(capsys, tmp_path / "there", "--to", "laguna", "--out", tmp_path / "back")
    assert code == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dflash_config"]["target_layer_ids"] == [4]
    there, back = proposals(tmp_path / "there"), proposals(tmp_path / "back")
    assert there == back
    first = proposals(source)
    same = sum(a == b for x, y in zip(first, there, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.95 * 20 * 7, "what was folded is rounded to bf16 once more"
    assert len({token for block in first for token in block}) > 20
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_gate_of_zeros_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_laguna(tmp_path / "laguna", gated=True)
    zeros = torch.zeros(6, 160, dtype=torch.bfloat16)
    change(source, layers__0__self_attn__g_proj__weight=zeros, layers__1__self_attn__g_proj__weight=zeros.clone())
    code, result, _ = run(capsys, source, "--to", "speculators", "--out", tmp_path / "out")
    assert code == 0
    assert "ln 2" in result["carried"]["output gate"]
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    name = "layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(after[name].float(), before[name].float() * math.log(2), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_reduced_vocabulary_has_the_most_frequent_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 50)
    flags = ["--draft-vocab", 8, "--text", text, "--out", tmp_path / "out"]
    code, result, _ = run(capsys, make_laguna(tmp_path / "laguna"), "--to", "speculators", *flags)
    assert code == 0
    assert "8 of the target's 512 rows" in result["carried"]["head"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tokens = tensors["d2t"] + torch.arange(8)
    assert tensors["t2d"].nonzero().flatten().tolist() == tokens.tolist()
    head = load_file(TEACHER / "model.safetensors")["lm_head.weight"]
    assert torch.equal(tensors["lm_head.weight"], head[tokens])
    assert {token for block in proposals(tmp_path / "out") for token in block} <= set(tokens.tolist())
    code, result, _ = run(capsys, tmp_path / "out", "--to", "laguna", "--dry-run")
    assert code == 1
    assert "8 of 512 tokens" in result["lost"]["reduced vocabulary"]


def test_toy_drafters_have_no_counterpart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = run(capsys, TOY / "dflash", "--to", "speculators", "--out", tmp_path / "out")
    assert code == 1
    assert set(result["lost"]) == {"tap norms", "output gate", "input norms on the context"}
    assert "3 parts do not carry over; nothing was written" in err
    code, result, _ = run(capsys, TOY / "dflash-speculators", "--to", "laguna", "--out", tmp_path / "out")
    assert code == 1
    assert set(result["lost"]) == {"taps without norms", "reduced vocabulary", "context norm"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "tensors", "lost"),
    [
        ({"target_layer_ids": (1, 4)}, {}, "tap norms"),
        ({"gated": True}, {}, "output gate"),
        ({}, {"hidden_norm__weight": torch.linspace(0.5, 1, 160).bfloat16()}, "input norms on the context"),
        ({}, {"hidden_norm__weight": torch.full((160,), -1.0).bfloat16()}, "input norms on the context"),
        ({}, {"layers__0__self_attn__sink": torch.zeros(6)}, "further tensors"),
    ],
)
def test_what_does_not_carry_over_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: dict[str, Any], tensors: dict[str, Any], lost: str
) -> None:
    source = make_laguna(tmp_path / "laguna", **shape)
    change(source, **tensors)
    code, result, _ = run(capsys, source, "--to", "speculators", "--dry-run")
    assert code == 1
    assert list(result["lost"]) == [lost]


@pytest.mark.parametrize(
    ("tensors", "lost"),
    [
        ({"layers__1__input_layernorm__weight": torch.full((160,), 2.0).bfloat16()}, "context norm"),
        ({"lm_head__weight": torch.zeros(512, 160).bfloat16()}, "head"),
        ({"embed_tokens__weight": torch.zeros(512, 160).bfloat16()}, "embedding"),
    ],
)
def test_own_head_embedding_or_norms_do_not_carry_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, Any], lost: str
) -> None:
    there = tmp_path / "there"
    assert run(capsys, make_laguna(tmp_path / "laguna"), "--to", "speculators", "--out", there)[0] == 0
    change(there, **tensors)
    code, result, _ = run(capsys, there, "--to", "laguna", "--dry-run")
    assert code == 1
    assert list(result["lost"]) == [lost]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dflash", "--to", "laguna", "--dry-run"], "expected the other format, got laguna already"),
        (["teacher", "--to", "laguna", "--dry-run"], "expected a DFlash drafter, got LagunaForCausalLM"),
        (["nowhere", "--to", "laguna", "--dry-run"], "expected an existing folder or a hub id"),
        (
            ["dflash", "--to", "speculators", "--draft-vocab", "600", "--text", "toy:training", "--dry-run"],
            "expected 1 to 511 tokens, got 600",
        ),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, TOY / arguments[0], *arguments[1:])
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "speculators"], "--out: expected a folder, got none"),
        (["--to", "speculators", "--draft-vocab", "8", "--dry-run"], "expected both or neither, got one"),
        (["--to", "laguna", "--draft-vocab", "8", "--text", "t", "--dry-run"], "expected --to speculators with it"),
    ],
)
def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([str(TOY / "dflash"), "--target", str(TEACHER), *arguments])
    assert message in capsys.readouterr().err


def test_output_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    source = make_laguna(tmp_path / "laguna")
    code, _, err = run(capsys, source, "--to", "speculators", "--out", tmp_path / "out")
    assert code == 2
    assert "expected an empty folder or none" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.vllm
def test_vllm_proposes_the_same_in_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Back and forth once, so that both sides hold the same rounded numbers."""
    assert run(capsys, make_laguna(tmp_path / "first"), "--to", "speculators", "--out", tmp_path / "there")[0] == 0
    assert run(capsys, tmp_path / "there", "--to", "laguna", "--out", tmp_path / "back")[0] == 0
    probe = Path(__file__).resolve().parents[2] / "plugins" / "proposals_probe.py"
    seen = []
    for name in ("there", "back"):
        out = tmp_path / f"{name}.json"
        done = run_warm(probe, str(TOY), str(tmp_path / name), "7", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        seen.append(json.loads(out.read_text())["requests"])
    assert [request["output"] for request in seen[0]] == [request["output"] for request in seen[1]]
    pairs = [(a, b) for x, y in zip(*seen, strict=True) for a, b in zip(x["proposals"], y["proposals"], strict=True)]
    assert len(pairs) > 40
    assert sum(a == b for a, b in pairs) >= 0.97 * len(pairs), "fp32 leaves hardly a tie"


@pytest.mark.slow
def test_command_line() -> None:
    laguna = [sys.executable, "-m", "laguna_serve.serving.cli", "drafter"]
    done = subprocess.run([*laguna, "convert", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: laguna drafter convert ")
    done = subprocess.run([*laguna], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("laguna: error: the following arguments are required: COMMAND")
