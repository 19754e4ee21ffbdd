"""Models that are not Laguna: planned where config.json suffices, served all the same; only Laguna's is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.plugins.layers import DENSE
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.others import SERVED_BY, read_served
from laguna_serve.serving.checkpoint.parameters import count_parameters
from laguna_serve.serving.checkpoint.target import Target
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.devices import plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.report import format_plan

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


# Sizes of published models, and the number of their parameters.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def write(folder: Path, base: dict[str, Any] = SMOLLM3, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(base | changes))
    return folder


def read_planned(folder: Path) -> Target:
    target = read_served(folder).target
    assert target is not None
    return target


def test_smollm3_is_planned(tmp_path: Path) -> None:
    plan = make_plan(EngineConfig(str(write(tmp_path))), plan_for("h100-80gb"), planned=True)
    assert not plan.refusals
    assert plan.classes == {"SmolLM3ForCausalLM": SERVED_BY}
    assert any("is no Laguna" in warning for warning in plan.warnings)
    assert plan.memory is not None
    assert plan.memory.weights == pytest.approx(2 * 3.075e9, rel=0.01)
    assert "--hf-overrides" not in plan.command
    target = plan.checkpoints.target
    assert target is not None
    assert target.kv_values_per_token == 36 * 2 * 4 * 128


def test_float32_is_planned_as_it_is_served(tmp_path: Path) -> None:
    """vLLM narrows it to 16 bits unless --dtype says otherwise: half of the files' bytes."""
    folder = write(tmp_path, dtype="float32")
    device = plan_for("h100-80gb")
    narrow, wide = (
        make_plan(EngineConfig(str(folder), dtype=dtype), device, planned=True) for dtype in ("auto", "float32")
    )
    assert narrow.memory is not None
    assert wide.memory is not None
    assert wide.memory.weights == pytest.approx(4 * 3.075e9, rel=0.01)
    assert 2 * narrow.memory.weights == wide.memory.weights
    assert narrow.layout is not None
    assert wide.layout is not None
    assert 2 * narrow.layout.layer_bytes == wide.layout.layer_bytes


@pytest.mark.parametrize(
    ("config", "parameters", "values"),
    [
        (QWEN3, 596_049_920, 28 * 2 * 8 * 128),
        (QWEN3_MOE, 30_532_122_624, 48 * 2 * 4 * 128),
        (LLAMA, 8_030_261_248, 32 * 2 * 8 * 128),
        (MIXTRAL, 46_702_792_704, 32 * 2 * 8 * 128),
    ],
    ids=["Qwen3-0.6B", "Qwen3-30B-A3B", "Llama-3.1-8B", "Mixtral-8x7B"],
)
def test_published_models_have_their_sizes(
    tmp_path: Path, config: dict[str, Any], parameters: int, values: int
) -> None:
    target = read_planned(write(tmp_path, config))
    assert count_parameters(target) == pytest.approx(parameters, rel=1e-4)
    assert target.kv_values_per_token == values


def test_dense_layers_of_a_mixture_are_known(tmp_path: Path) -> None:
    target = read_planned(write(tmp_path, QWEN3_MOE, first_k_dense_replace=1, mlp_only_layers=[5], n_shared_experts=2))
    assert [layer for layer, kind in enumerate(target.mlp_kinds) if kind == DENSE] == [0, 5]
    assert target.shared_expert_size == 2 * 768


def test_window_that_is_not_used_counts_for_nothing(tmp_path: Path) -> None:
    assert read_planned(write(tmp_path, QWEN3, sliding_window=4096, use_sliding_window=False)).sliding_layers == 0


def test_sliding_layers_are_counted(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 18
    target = read_planned(write(tmp_path, layer_types=kinds, sliding_window=512))
    assert (target.full_layers, target.sliding_layers, target.sliding_window) == (18, 18, 512)


UNPLANNED = [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantised"),
    ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, "no class that plans"),
    ({"architectures": ["ChatGLMModel"], "num_hidden_layers": None}, "no class that plans"),
    ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": SMOLLM3}, "no class that plans"),
    ({"architectures": None, "model_type": "llama"}, "names no class"),
    ({"layer_types": ["linear_attention", "full_attention"] * 18}, "other kinds"),
    ({"sliding_window": 4096}, "which layers have a window"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "lengthened"),
    ({"dtype": "float8_e4m3fn"}, "stored in float8_e4m3fn"),
]


@pytest.mark.parametrize("device", [plan_for("h100-80gb"), Device("cpu", "CPU", 16 << 30, 8 << 30)], ids=["gpu", "cpu"])
@pytest.mark.parametrize(("changes", "reason"), UNPLANNED)
def test_what_cannot_be_planned_is_served(tmp_path: Path, changes: dict[str, Any], reason: str, device: Device) -> None:
    config = EngineConfig(str(write(tmp_path, **changes)))
    plan = make_plan(config, device, planned=True)
    assert (plan.refusals, plan.memory, plan.context) == ((), None, None)
    assert "--model" in plan.command
    assert re.search(reason, format_plan(plan))
    assert re.search(rf"are not planned \(.*{reason}.*\), answers were", " ".join(plan.warnings))
    assert set(plan.classes.values()) == {SERVED_BY}


def test_modelopts_own_file_is_seen(tmp_path: Path) -> None:
    (write(tmp_path) / "hf_quant_config.json").write_text("{}")
    assert read_served(tmp_path).unplanned == "its weights are quantised"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_mask": __file__, "group_indices": __file__}, "a keep mask"),
        ({"weight_updates": True}, "weight updates"),
        ({"return_routed_experts": True}, "--return-routed-experts"),
    ],
)
def test_what_only_laguna_has_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    config = EngineConfig(str(write(tmp_path)), **options)
    with pytest.raises(CheckpointError, match=f"expected a Laguna for {what}, got SmolLM3ForCausalLM"):
        make_plan(config, plan_for("h100-80gb"), planned=True)


def test_a_drafter_is_checked_where_the_model_is_planned(tmp_path: Path) -> None:
    config = EngineConfig(str(write(tmp_path)), draft=str(TOY / "dflash"))
    with pytest.raises(CheckpointError, match="expected the target's vocabulary 128256, got 512"):
        make_plan(config, plan_for("h100-80gb"), planned=True)
    sizes = {"vocab_size": 512, "hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5}
    fits = EngineConfig(str(write(tmp_path, **sizes, num_key_value_heads=5)), draft=str(TOY / "dflash"))
    plan = make_plan(fits, plan_for("h100-80gb"), planned=True)
    assert plan.checkpoints.gamma == 7
    assert not [line for line in plan.warnings if "does not say what it was trained for" in line]
    write(tmp_path, quantization_config={"quant_method": "fp8"})
    (warning,) = [line for line in make_plan(config, plan_for("h100-80gb"), planned=True).warnings if "fits" in line]
    assert warning.endswith("dflash: not checked whether it fits SmolLM3ForCausalLM, as its weights are quantised")


def test_strangers_and_broken_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model that generates text, got BertModel"):
        read_served(write(tmp_path, architectures=["BertModel"]))
    with pytest.raises(CheckpointError, match="expected a Laguna model, got model_type None"):
        read_served(write(tmp_path, architectures=[], model_type=None))
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_served(write(tmp_path, hidden_size="wide"))


def test_laguna_is_read_as_before() -> None:
    served = read_served(TOY / "teacher")
    assert served.target is not None
    assert (served.target.architecture, served.other) == ("LagunaForCausalLM", None)
