"""Models that are not Laguna: SmolLM3 is planned, what only Laguna has is refused, and anything else still is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.others import read_served
from laguna_serve.serving.planning.devices import plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan

TOY = Path(__file__).resolve().parents[2] / "toy"
# SmolLM3-3B's own sizes.
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(SMOLLM3 | changes))
    return folder


def test_smollm3_is_planned(tmp_path: Path) -> None:
    plan = make_plan(EngineConfig(str(write(tmp_path))), plan_for("h100-80gb"), planned=True)
    assert not plan.refusals
    assert plan.classes == {"SmolLM3ForCausalLM": "vLLM's Transformers backend"}
    assert any("is no Laguna" in warning for warning in plan.warnings)
    assert plan.memory is not None
    assert plan.memory.weights == pytest.approx(2 * 3.075e9, rel=0.01)
    assert "--hf-overrides" not in plan.command
    target = plan.checkpoints.target
    assert target is not None
    assert target.kv_values_per_token == 36 * 2 * 4 * 128


def test_sliding_layers_are_counted(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 18
    target = read_served(write(tmp_path, layer_types=kinds, sliding_window=512))
    assert (target.full_layers, target.sliding_layers, target.sliding_window) == (18, 18, 512)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"draft": str(TOY / "dflash")}, "a drafter"),
        ({"keep_mask": __file__, "group_indices": __file__}, "a keep mask"),
        ({"weight_updates": True}, "weight updates"),
    ],
)
def test_what_only_laguna_has_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    config = EngineConfig(str(write(tmp_path)), **options)
    with pytest.raises(CheckpointError, match=f"expected a Laguna for {what}, got SmolLM3ForCausalLM"):
        make_plan(config, plan_for("h100-80gb"), planned=True)


def test_quantised_ones_and_strangers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without quantization_config"):
        read_served(write(tmp_path, quantization_config={"quant_method": "fp8"}))
    with pytest.raises(CheckpointError, match="expected a Laguna model, got LlamaForCausalLM"):
        read_served(write(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama"))
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_served(write(tmp_path, hidden_size="wide"))


def test_laguna_is_read_as_before() -> None:
    assert read_served(TOY / "teacher").architecture == "LagunaForCausalLM"
