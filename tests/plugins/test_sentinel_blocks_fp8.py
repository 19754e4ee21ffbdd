"""Pruned experts in FP8 in vLLM: the tokens of the dequantised, zeroed original, and the bytes of the arithmetic.

Both are computed in fp32, where an FP8 value times its scale is exact: the weights are the same numbers, and only sums
are in another order. In bf16 the original's weights would be rounded, and the FP8 model's experts not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laguna_serve.plugins.formats.experts import FP8
from laguna_serve.serving.checkpoint import read_target
from laguna_serve.serving.checkpoint.parameters import estimate_held

TOY = Path(__file__).resolve().parent.parent / "toy"
MASK, INDICES = (TOY / "masks" / f"group_{name}.npy" for name in ("keep_mask_25pct", "indices_importance_sorted"))
SCALED = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point", "prob_scale")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name → a checkpoint of the toy teacher: the one in FP8 as released, and what is made of it."""
    from laguna_serve.scripts.checkpoints.compact import CompactConfig, compact
    from laguna_serve.scripts.checkpoints.quantise import QuantiseConfig, quantise

    root = tmp_path_factory.mktemp("fp8")
    masks = {"keep_mask": MASK, "group_indices": INDICES}

    @functools.cache
    def make(name: str) -> Path:
        out = root / name
        if name == "fp8":
            quantise(QuantiseConfig(source=str(TOY / "teacher"), to="fp8", out=out))
        elif name == "fp32":
            quantise(QuantiseConfig(source=str(make("fp8")), to="fp32", out=out))
        elif name == "zeroed":
            compact(CompactConfig(base=str(make("fp32")), **masks, zeroed=True, out=out))
        elif name == "compact":
            compact(CompactConfig(base=str(make("fp8")), **masks, out=out))
        else:
            assert name == "rounded"
            compact(CompactConfig(base=str(TOY / "teacher"), **masks, to="fp8", out=out))
        return out

    return make


def with_plain_cache(folder: Path, **overrides: Any) -> dict[str, Any]:
    """The checkpoint's quantisation without its FP8 KV cache, which the dequantised original does not have."""
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {"hf_overrides": {"quantization_config": described | {"kv_cache_scheme": None}} | overrides}


@pytest.mark.vllm
def test_same_greedy_tokens_as_the_dequantised_zeroed_original(made: Any, run_model: Any) -> None:
    compact = run_model(made("compact"), **with_plain_cache(made("compact")))
    original = run_model(made("zeroed"))
    assert (compact["class"], original["class"]) == ("LagunaSentinelForCausalLM", "LagunaForCausalLM")
    assert len(compact["tokens"]) == 64
    assert compact["tokens"] == original["tokens"]


@pytest.mark.vllm
def test_what_is_held_is_the_arithmetic(made: Any, run_model: Any) -> None:
    """Payload and fp32 scales of kept atoms, and the dequantised rest: every byte."""
    held = run_model(made("compact"), **with_plain_cache(made("compact")))["parameters"]
    assert {size for name, (_, size) in held.items() if name.endswith("_blocks")} == {1}
    held = {name: numel * size for name, (numel, size) in held.items() if not name.endswith(SCALED)}
    target = read_target(made("compact"))
    assert target.experts is not None
    assert target.experts.format == FP8
    weights = estimate_held(target, dequantised=True, dtype="float32")
    assert sum(size for name, size in held.items() if name.endswith("_blocks")) == weights.values
    assert sum(size for name, size in held.items() if name.endswith("_scales")) == weights.scales
    starts = 4 * (target.num_experts + 1) * 5  # buffers, which are no parameters
    assert sum(held.values()) + starts == weights.total


@pytest.mark.vllm
def test_fp8_base_is_cut_while_it_loads(made: Any, run_model: Any) -> None:
    """The compact checkpoint's model, to the bit."""
    files = {"keep_mask": str(MASK), "group_indices": str(INDICES)}
    overrides = {"architectures": ["LagunaSentinelForCausalLM"], "expert_pruning": files}
    masked = run_model(made("fp8"), **with_plain_cache(made("fp8"), **overrides))
    compact = run_model(made("compact"), **with_plain_cache(made("compact")))
    assert masked["tokens"] == compact["tokens"]
    assert masked["parameters"] == compact["parameters"]


@pytest.mark.vllm
def test_speculation_gives_the_same_tokens(made: Any, run_model: Any) -> None:
    drafter = {"method": "dflash", "model": str(TOY / "dflash"), "num_speculative_tokens": 7}
    plain = with_plain_cache(made("compact"))
    drafted = run_model(made("compact"), speculative_config=drafter, **plain)
    assert drafted["tokens"] == run_model(made("compact"), **plain)["tokens"]


@pytest.mark.vllm
def test_new_weights_in_fp8_in_place(made: Any, run_model: Any, tmp_path: Path) -> None:
    """Payload and scales of experts that were rounded by us: others, a NaN that is refused, and the first ones."""
    rounded, other, broken = made("rounded"), tmp_path / "other", tmp_path / "broken"
    weights = load_file(rounded / "model.safetensors")
    for folder in (other, broken):
        folder.mkdir()
    for name in weights:
        if name.endswith("w13_scales"):
            weights[name] = weights[name] * 1.5
    save_file(weights, other / "model.safetensors")
    weights["model.layers.2.mlp.experts.w2_blocks"].view(torch.uint8)[0, 0, 0] = 0x7F  # NaN
    save_file(weights, broken / "model.safetensors")
    updates = [{"folder": str(folder)} for folder in (other, broken, rounded)]
    report = run_model(rounded, updates=updates, prompts=8)
    changed, refused, restored = report["updates"]
    assert changed["refused"] is None
    assert changed["tokens"] != report["tokens"]
    assert "expected finite values for all of model.layers.2.mlp.experts.w2_blocks" in refused["refused"]
    assert refused["tokens"] == changed["tokens"]
    assert restored["tokens"] == report["tokens"]


def experts(stored: str) -> Any:
    from laguna_serve.plugins.models.sentinel import LayerPlan, SentinelExperts

    return SentinelExperts(16, 160, LayerPlan(20, 16, 8, format=stored), "layer")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("stored", "name", "tensor", "message"),
    [
        ("fp8", "w2_blocks", torch.zeros(20, 16, 160).bfloat16(), "expected values in FP8 .*got w2_blocks in torch.bf"),
        ("fp8", "w2_scales", torch.zeros(20, 16, 1), r"expected w2_scales \[20, 16, 2\], got \[20, 16, 1\]"),
        (
            "plain",
            "w2_blocks",
            torch.zeros(20, 16, 160).to(torch.float8_e4m3fn),
            "expected unquantised values, got w2_",
        ),
        ("plain", "w2_scales", torch.zeros(20, 16, 2), "expected kept blocks, .*, unquantised, got w2_scales"),
    ],
)
def test_tensors_in_other_numbers_are_named(stored: str, name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(experts(stored).load_weights([(name, tensor)]))


@pytest.mark.vllm
def test_linear_layers_are_dequantised_while_they_load() -> None:
    from laguna_serve.plugins.models.fp8_layers import LoadError, dequantise_linears

    values, scale = torch.randn(160, 130).to(torch.float8_e4m3fn), torch.rand(2, 2).bfloat16()
    norm, name = torch.ones(3), "model.layers.1.mlp.shared_expert.up_proj.weight"
    expert = ("model.layers.1.mlp.experts.0.up_proj.weight", values)
    weights = [("norm", norm), (f"{name}_scale", scale), expert, (name, values)]
    found = dict(dequantise_linears(weights))
    assert list(found) == ["norm", expert[0], name]
    assert found[expert[0]].dtype == torch.float8_e4m3fn
    assert found[name][159, 129] == values[159, 129].float() * scale[1, 1].float()
    assert found[name][0, 127] == values[0, 127].float() * scale[0, 0].float()
    with pytest.raises(LoadError, match="expected FP8 values and scales, got its scales alone"):
        list(dequantise_linears(weights[:3]))
    with pytest.raises(LoadError, match=r"expected FP8 with a scale for each 128×128 block \[2, 2\], got \[1, 2\]"):
        list(dequantise_linears([(name, values), (f"{name}_scale", scale[:1])]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fp4"}, "expected expert_pruning.format to be 'plain' or 'fp8', got 'fp4'; a newer version wrote"),
        (
            {"kept_blocks": [129] * 5},
            "expected expert_pruning.kept_blocks to be from 0 to 128, 8 of each of 16 experts",
        ),
    ],
)
def test_description_is_checked_before_a_start(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from laguna_serve.serving.checkpoint import CheckpointError

    config = json.loads((TOY / "teacher" / "config.json").read_text())
    pruning = {"format": "fp8", "kept_blocks": [100] * 5, "block_size": 16, "blocks_per_expert": 8} | changes
    (tmp_path / "config.json").write_text(json.dumps(config | {"expert_pruning": pruning}))
    with pytest.raises(CheckpointError, match=message):
        read_target(tmp_path)


def test_blocks_that_no_kernel_takes_are_refused_before_a_start(tmp_path: Path) -> None:
    from laguna_serve.serving.planning.devices import plan_for
    from laguna_serve.serving.planning.engine_config import EngineConfig
    from laguna_serve.serving.planning.plan import make_plan

    config = json.loads((TOY / "teacher" / "config.json").read_text())
    pruning = {"kept_blocks": [100] * 5, "block_size": 8, "blocks_per_expert": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | {"expert_pruning": pruning}))
    refusals = make_plan(EngineConfig(str(tmp_path)), plan_for("h200"), planned=True).refusals
    assert refusals[0].startswith(f"{tmp_path}: expected blocks of a multiple of 16 atoms, got 8; ")


@pytest.mark.vllm
def test_fp8_student_gives_the_tokens_of_its_dequantised_form(tmp_path: Path, run_model: Any) -> None:
    """Padded, and cut to its true widths; in fp32, with the KV cache in fp32."""
    from laguna_serve.scripts.checkpoints.quantise import QuantiseConfig, quantise
    from laguna_serve.scripts.checkpoints.unpad import WidthsConfig, unpad

    student, plain, cut = (tmp_path / name for name in ("fp8", "fp32", "cut"))
    quantise(QuantiseConfig(source=str(TOY / "dense"), to="fp8", out=student))
    quantise(QuantiseConfig(source=str(student), to="fp32", out=plain))
    assert len(set(unpad(WidthsConfig(source=str(student), out=cut)).widths)) > 1
    original = run_model(plain, hf_overrides={"architectures": ["LagunaForCausalLM"]}, prompts=32)
    padded = with_plain_cache(student, architectures=["LagunaDenseForCausalLM"])
    for report in (run_model(cut, prompts=32, **with_plain_cache(cut)), run_model(student, prompts=32, **padded)):
        assert report["class"] == "LagunaDenseForCausalLM"
        assert report["tokens"] == original["tokens"]
