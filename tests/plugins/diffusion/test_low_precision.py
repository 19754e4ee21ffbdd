"""A draft in fewer bits: what is stored, how near it stays, that no text changes; refused in a line without torchao."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_models import make_model

from laguna_serve.plugins.diffusion import low_precision
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.low_precision import count_stored_bytes, quantise
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.proposing.prepared import count_read
from laguna_serve.plugins.diffusion.server import options
from laguna_serve.plugins.diffusion.server.options import parse_options
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, plan_launch

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
PYTHON = ROOT / ".venv-train" / "bin" / "python"
wants_torchao = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-train: bash scripts/client_env.sh train")
TRIED = """
import json, sys
from pathlib import Path
import torch
from laguna_serve.plugins.diffusion.low_precision import quantise
from laguna_serve.plugins.diffusion.model import load_model
from laguna_serve.plugins.diffusion.proposing.prepared import find_cost

folder = Path(sys.argv[1])
target, ids = load_model(folder), torch.arange(40)[None]
expected = target(ids)
found = {}
for weights in ("target", "fp8", "int8", "int4"):
    draft = load_model(folder)
    quantise(draft, weights)
    got = draft(ids)
    found[weights] = {
        "error": float((got - expected).abs().mean() / expected.abs().mean()),
        "cost": find_cost(target, draft),
        "head": str(draft.read_out(torch.zeros(1, target.config.d_model)).dtype),
        "embedding": str(draft.embedding.weight.dtype),
    }
print(json.dumps(found))
"""


def run_apart(*arguments: str) -> str:
    """Run a program where torchao is; its last line."""
    done = subprocess.run([str(PYTHON), *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@wants_torchao
def test_fewer_bits_are_near_and_read_less() -> None:
    found = json.loads(run_apart("-c", TRIED, str(TOY / "llada-draft")))
    assert found["target"] == {"error": 0, "cost": 1, "head": "torch.float32", "embedding": "torch.float32"}
    assert found["int8"]["error"] < found["fp8"]["error"] < found["int4"]["error"] < 0.5
    assert found["int8"]["error"] < 0.05
    # A byte and scales for four bytes; the head stays.
    assert all(0.25 < found[weights]["cost"] < 0.6 for weights in ("fp8", "int8", "int4"))
    assert {at["head"] for at in found.values()} == {at["embedding"] for at in found.values()} == {"torch.float32"}


@pytest.mark.slow
@wants_torchao
def test_no_text_depends_on_the_drafts_bits(tmp_path: Path) -> None:
    flags = ["--draft", str(TOY / "llada-draft"), "--draft-weights", "int8,int4", "--states", "2", "--canvas", "16"]
    flags += [
        "--proposals",
        str(TOY / "llada-proposals"),
        "--prompts",
        str(TOY / "prompts.jsonl"),
        "--num-prompts",
        "4",
    ]
    flags += ["--block", "16", "--concurrency", "1", "--model", str(TOY / "llada"), "--out", str(tmp_path / "out")]
    run_apart(str(ROOT / "bench" / "diffusion"), *flags)
    result = json.loads((tmp_path / "out" / "diffusion.json").read_text())
    assert [draft["weights"] for draft in result["drafts"]] == ["int8", "int4"]
    for draft in result["drafts"]:
        assert draft["cost"] < result["cost"]
        assert [point["proposer"] for point in draft["points"]] == ["draft, gated", "draft"]
        assert all(point["differing"] == 0 < point["accepted"] for point in draft["points"])
        assert all(sum(steps for steps, _ in point["counts"]) == 4 * 16 for point in draft["points"])
    page = (tmp_path / "out" / "diffusion.md").read_text()
    assert "The draft in fewer bits, one request at a time:" in page


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(
        DiffusionError, match=r"--draft-weights fp8: expected an environment with torchao, got none; pip"
    ):
        quantise(model, "fp8")
    config = EngineConfig(
        model=str(TOY / "llada"), draft=str(TOY / "llada-draft"), extra_args=("--draft-weights", "fp8")
    )
    with pytest.raises(EngineError, match="--draft-weights fp8: expected an environment with torchao"):
        plan_launch(config)
    quantise(model, "target")
    weight = model.embedding.weight
    assert weight.dtype == torch.float32
    assert count_stored_bytes(weight) == weight.numel() * 4


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module in torchao's place that takes everything and does nothing."""

    def make(*_: Any, **settings: Any) -> dict[str, Any]:
        return settings

    names = (
        "Int4WeightOnlyConfig",
        "Int8WeightOnlyConfig",
        "Float8WeightOnlyConfig",
        "IntxWeightOnlyConfig",
        "PerGroup",
    )
    fake = SimpleNamespace(**dict.fromkeys(names, make), quantize_=lambda *_: None)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=fake))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    return fake


def test_what_torchao_does_not_take_is_refused_in_a_line(torchao: SimpleNamespace) -> None:
    with pytest.raises(DiffusionError, match="--draft-weights fp8: expected shapes that torchao takes, got 32 × 32; "):
        quantise(make_model(), "fp8")
    with pytest.raises(DiffusionError, match="--draft-weights int4: expected rows of a multiple of 8 weights, got 44"):
        low_precision._configure("int4", "cpu", 44)
    with pytest.raises(DiffusionError, match="expected rows of a multiple of 32 weights, got 48"):
        low_precision._configure("int4", "cuda", 48)
    assert low_precision._configure("int4", "cuda", 192) == {"group_size": 64}

    def refuse(*_: Any) -> None:
        raise AssertionError("PerRow only works for bfloat16\n")

    torchao.quantize_ = refuse
    with pytest.raises(DiffusionError, match="int8: expected cpu to take it, torchao says: PerRow only works for bfl"):
        quantise(make_model(), "int8")


def test_a_tied_head_is_read_whole() -> None:
    untied = make_model()
    tied = Llada(replace(untied.config, weight_tying=True))
    assert count_read(tied) == count_read(untied)


def test_bits_of_a_draft_that_is_not_there_are_refused() -> None:
    with pytest.raises(DiffusionError, match="--draft-weights int4: expected --draft beside it, got none"):
        parse_options(["M", "--draft-weights", "int4"])
    with pytest.raises(DiffusionError, match="--draft-weights"):
        parse_options(["M", "--draft", "D", "--draft-weights", "int3"])
    assert parse_options(["M", "--draft", "D", "--draft-weights", "fp8"]).draft_weights == "fp8"
