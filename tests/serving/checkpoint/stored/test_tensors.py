"""Tensors that a Laguna's checkpoint lacks are named before vLLM serves what lay in memory in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from release_cases import TARGETS, folder, read_tensors
from safetensors.torch import load_file, save_file

from laguna_serve.scripts.checkpoints.requantised import QUANTISATION
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.stored.shapes import check_shapes
from laguna_serve.serving.checkpoint.stored.tensors import list_missing, require_numbers, require_tensors
from laguna_serve.serving.checkpoint.stored.weight_files import TensorHeader
from laguna_serve.serving.checkpoint.target import read_target
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.planning.launch import check_launch

TOY = Path(__file__).resolve().parents[3] / "toy"
SPARSE = "model.layers.3.mlp.experts.7.up_proj.weight"
BIAS = "model.layers.{}.mlp.experts.e_score_correction_bias"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOY / "teacher", tmp_path / "teacher"))


def remove(folder: Path, *names: str) -> None:
    """Write the weights again without some of their tensors."""
    weights = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name not in names}, weights)


@pytest.mark.parametrize("name", ["teacher", "dense"])
def test_whole_checkpoints_lack_nothing(name: str) -> None:
    require_tensors(read_target(TOY / name), TOY / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_published_releases_lack_nothing(name: str) -> None:
    assert list_missing(read_target(Path(folder(name))), read_tensors(name)) == []


def test_what_a_quantiser_adds_to_one_layer_is_missed_in_none(teacher: Path) -> None:
    names = list(load_file(teacher / "model.safetensors"))
    extra = ["model.layers.2.self_attn.k_scale", "model.layers.2.mlp.smooth.scales"]
    assert list_missing(read_target(teacher), [*names, *extra]) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_head.weight"], 'expected tensors of lm_head, got none; .* or say "tie_word_embeddings": true'),
        (["model.embed_tokens.weight"], "expected tensors of embed_tokens, got none"),
        (["model.layers.2.self_attn.q_proj.weight"], r"expected tensors of layers\.2\.self_attn\.q_proj, got none"),
        ([SPARSE], r"expected tensors of layers\.3\.mlp\.experts\.7\.up_proj, got none"),
        (
            [f"model.layers.{n}.self_attn.g_proj.weight" for n in range(6)],
            r"layers\.0\.self_attn\.g_proj and of 5 more",
        ),
        ([BIAS.format(4)], r"expected tensors of layers\.4\.mlp\.experts\.e_score_correction_bias, got none"),
        ([BIAS.format(n) for n in range(1, 6)], r"layers\.1\.mlp\.experts\.e_score_correction_bias and of 4 more"),
        ([SPARSE, "model.layers.5.mlp.gate.weight"], r"layers\.3\.mlp\.experts\.7\.up_proj and of 1 more, got none"),
    ],
)
def test_what_is_missing_is_named_before_an_engine_starts(teacher: Path, names: list[str], message: str) -> None:
    remove(teacher, *names)
    with pytest.raises(CheckpointError, match=message):
        check_launch(EngineConfig(str(teacher)))


def test_pruned_experts_need_the_class_that_reads_them(teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    width, sparse = config["moe_intermediate_size"], config["mlp_layer_types"].count("sparse")
    pruning = {"block_size": width // 8, "blocks_per_expert": 8, "kept_blocks": [1] * sparse}
    (teacher / "config.json").write_text(json.dumps(config | {"expert_pruning": pruning}))
    message = "expected LagunaSentinelForCausalLM of pruned experts, got LagunaForCausalLM; name it in config.json"
    with pytest.raises(CheckpointError, match=message):
        check_launch(EngineConfig(str(teacher)))


def test_tied_output_layer_is_not_missed(teacher: Path) -> None:
    remove(teacher, "lm_head.weight")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    check_launch(EngineConfig(str(teacher)))


def test_output_layer_beside_a_tied_embedding_is_that_embedding(teacher: Path) -> None:
    config, weights = json.loads((teacher / "config.json").read_text()), teacher / "model.safetensors"
    (teacher / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r'expected lm_head to be embed_tokens, .* got another; say "tie_word_em'):
        check_launch(EngineConfig(str(teacher)))
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights)
    check_launch(EngineConfig(str(teacher)))


def test_model_without_a_tokenizer_is_refused_unless_one_is_named(teacher: Path) -> None:
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected a tokenizer \(tokenizer.json\), got none; copy the base model's"
    ):
        check_launch(EngineConfig(str(teacher)))
    check_launch(EngineConfig(str(teacher), extra_args=("--tokenizer", str(TOY / "teacher"))))


def test_files_of_other_families_are_vllms_to_judge(tmp_path: Path) -> None:
    """They tie, name and tokenize in ways of their own."""
    shutil.copy(TOY / "teacher" / "model.safetensors", tmp_path)
    shape = {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128_256}
    sizes = {"hidden_size": 2048, "intermediate_size": 11_008, "max_position_embeddings": 65_536}
    config = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "dtype": "bfloat16", **shape, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_launch(EngineConfig(str(tmp_path))).other == "SmolLM3ForCausalLM"


def make_fp8(folder: Path, layer: str, *, scale: str | None) -> str:
    """Store a matrix in FP8, with ones as its scale under that name; return the matrix's own."""
    name = f"model.layers.{layer}.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    if scale is not None:
        tensors[f"model.layers.{layer}.{scale}"] = torch.ones(2, 2, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return name


@pytest.mark.parametrize("scale", [None, "weight_scale"])
def test_fp8_values_that_config_json_does_not_mention_are_named(teacher: Path, scale: str | None) -> None:
    name = make_fp8(teacher, "0.mlp.up_proj", scale=scale)
    message = f"expected plain weights, as config.json says, got {name} in F8_E4M3; fetch config.json again"
    with pytest.raises(CheckpointError, match=message):
        check_launch(EngineConfig(str(teacher)))
    check_launch(EngineConfig(str(teacher), extra_args=("--hf-overrides", "{}")))


@pytest.mark.parametrize(
    ("scale", "got"), [(None, "none"), ("weight_scale_inv", "model.*up_proj.weight_scale_inv: another format's")]
)
def test_fp8_values_without_their_scale_are_named(teacher: Path, scale: str | None, got: str) -> None:
    name = make_fp8(teacher, "0.mlp.up_proj", scale=scale)
    config = json.loads((teacher / "config.json").read_text()) | {"quantization_config": QUANTISATION}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"expected {name}_scale, as config.json says, got {got}"):
        require_numbers(read_target(teacher), teacher)


def test_fp8_values_with_their_scale_are_taken(teacher: Path) -> None:
    make_fp8(teacher, "0.mlp.up_proj", scale="weight_scale")
    config = json.loads((teacher / "config.json").read_text()) | {"quantization_config": QUANTISATION}
    (teacher / "config.json").write_text(json.dumps(config))
    require_numbers(read_target(teacher), teacher)


@pytest.mark.parametrize(
    ("model", "said", "message"),
    [
        (
            "teacher",
            {"intermediate_size": 256},
            r"layers\.0\.mlp\.\w+_proj\.weight of (256×160|160×256), .* got \d+×\d+",
        ),
        ("teacher", {"shared_expert_intermediate_size": 64}, r"shared_expert\.\w+\.weight of (64×160|160×64)"),
        ("teacher", {"moe_intermediate_size": 256}, r"experts\.\d+\.\w+\.weight of (256×160|160×256)"),
        ("teacher", {"vocab_size": 448}, r"expected (lm_head|model\.embed_tokens)\.weight of 448×160, as config.json"),
        ("teacher", {"num_experts": 12}, r"expected 12 experts, as config.json says, got model\.layers\.\d\.mlp\.exp"),
        (
            "dense",
            {"intermediate_size": 300},
            r"layers\.\d\.mlp\.\w+\.weight of (300×\d+|\d+×300), as config.json says",
        ),
        ("dense", {"intermediate_size_per_layer": [672, 656, *[672] * 4]}, r"layers\.1\.mlp\.\w+\.weight of .*656"),
        ("dense", {"num_key_value_heads": 1}, r"self_attn\.[kv]_proj\.weight of"),
    ],
)
def test_sizes_are_those_of_config_json(model: str, said: dict[str, Any], message: str, tmp_path: Path) -> None:
    """vLLM would serve a part of what is larger, and what lay in memory behind what is smaller."""
    path = Path(shutil.copytree(TOY / model, tmp_path / model))
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | said))
    with pytest.raises(CheckpointError, match=message):
        check_launch(EngineConfig(str(path)))
    check_launch(EngineConfig(str(path), extra_args=("--hf-overrides", "{}")))


def test_layers_are_as_many_as_config_json_says(teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    lists = {key: config[key][:4] for key in ("layer_types", "mlp_layer_types", "num_attention_heads_per_layer")}
    (teacher / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, **lists}))
    with pytest.raises(CheckpointError, match=r"expected 4 layers, as config.json says, got model\.layers\.[45]"):
        check_launch(EngineConfig(str(teacher)))


def test_transformers_name_of_shared_experts_is_refused_with_what_renames_it(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    tensors = {name.replace(".shared_expert.", ".shared_experts."): t for name, t in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(
        CheckpointError, match=r"expected .*shared_expert\.\w+.*, got .*shared_experts\..*; save it again"
    ):
        check_launch(EngineConfig(str(teacher)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_published_sizes_are_those_of_their_configs(name: str) -> None:
    headers = {key: TensorHeader(dtype, tuple(shape), (0, 0)) for key, (dtype, shape) in read_tensors(name).items()}
    check_shapes(read_target(Path(folder(name))), Path(folder(name)), headers)


def test_tensor_in_two_files_is_refused(teacher: Path) -> None:
    """An engine takes the later file's; the tools ask the index."""
    tensors = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").rename(teacher / "model-00001-of-00002.safetensors")
    save_file({SPARSE: torch.zeros_like(tensors[SPARSE])}, teacher / "model-00002-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    index["weight_map"]["model.other"] = "model-00002-of-00002.safetensors"
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"expected every tensor once, got {SPARSE} in model-00001.* and model"):
        check_launch(EngineConfig(str(teacher)))


def test_base_that_masks_cut_while_it_loads_is_served(teacher: Path) -> None:
    """Its class is named beside the masks, and its matrices are whole."""
    masks = TOY / "masks"
    mask, indices = masks / "group_keep_mask_25pct.npy", masks / "group_indices_importance_sorted.npy"
    config = EngineConfig(str(teacher), keep_mask=str(mask), group_indices=str(indices))
    assert check_launch(config).target.pruned
    described = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(described | {"shared_expert_intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="shared_expert"):
        check_launch(config)
