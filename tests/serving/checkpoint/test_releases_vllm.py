"""The published releases' configs in vLLM's own words: what it accepts, and that it reads what we read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from release_cases import DRAFTERS, NAMES, TARGETS, find_drafter, find_kind, folder, read_config

from laguna_serve.plugins.layers import DEFAULT_ROPE, DEFAULTS, resolve_layer_kinds
from laguna_serve.plugins.register import register
from laguna_serve.serving.checkpoint import read_target
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.planning.command import choose_overrides
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.speculation.drafting import check_fit, format_speculation

pytestmark = pytest.mark.vllm
TOKENIZER = str(Path(__file__).resolve().parents[2] / "toy" / "teacher")
# Spellings of a toy's dense layers that tools write, with what is left of the other keys.
DENSE_SPELLINGS: dict[str, dict[str, Any]] = {
    "num_experts": {"num_experts": 0, "mlp_layer_types": None},
    "mlp_only_layers": {"mlp_only_layers": [0, 1, 2, 3, 4, 5], "decoder_sparse_step": 1, "mlp_layer_types": None},
    "decoder_sparse_step": {"decoder_sparse_step": 0, "mlp_layer_types": None},
    "mlp_layer_types": {"mlp_layer_types": ["dense"] * 6},
}


def make_model_config(path: str, overrides: dict[str, Any] | None = None) -> Any:
    from vllm.config import ModelConfig

    register()
    return ModelConfig(model=path, tokenizer=TOKENIZER, max_model_len=1024, hf_overrides=overrides or {})


def make_speculative_config(target: str, draft: str, gamma: int) -> Any:
    from vllm.config import ParallelConfig, SpeculativeConfig

    return SpeculativeConfig(
        **format_speculation(draft, gamma),
        target_model_config=make_model_config(
            target, choose_overrides(EngineConfig(target), read_target(Path(target)))
        ),
        target_parallel_config=ParallelConfig(),
    )


@pytest.mark.parametrize("name", TARGETS)
def test_vllm_accepts_every_target_and_reads_the_same(name: str) -> None:
    ours = read_target(Path(folder(name)))
    model = make_model_config(folder(name), choose_overrides(EngineConfig(folder(name)), ours))
    theirs = model.hf_config
    assert model.architectures == ["LagunaForCausalLM"]
    assert model.quantization == (None if find_kind(name) is None else "compressed-tensors")
    assert tuple(theirs.mlp_layer_types) == ours.mlp_kinds
    assert tuple(theirs.layer_types or ["full_attention"] * ours.num_layers) == ours.attention_kinds
    assert tuple(theirs.num_attention_heads_per_layer) == ours.heads
    assert model.get_vocab_size() == ours.vocab_size
    assert model.get_hidden_size() == ours.hidden_size
    assert (theirs.num_key_value_heads, theirs.head_dim) == (ours.num_kv_heads, ours.head_dim)
    assert (theirs.num_experts, theirs.max_position_embeddings) == (ours.num_experts, ours.max_model_len)
    assert str(model.dtype) == f"torch.{ours.dtype}"


@pytest.mark.parametrize("name", TARGETS)
def test_vllm_accepts_every_drafter_with_its_target(name: str) -> None:
    draft = find_drafter(name)
    if draft is None:
        assert name.startswith("Laguna-M.1"), "no drafter is published for this release alone"
        return
    ours = read_drafter(Path(folder(draft)))
    check_fit(read_target(Path(folder(name))), ours)
    theirs = make_speculative_config(folder(name), folder(draft), ours.max_gamma)
    assert theirs.method == "dflash"
    assert theirs.num_speculative_tokens == ours.max_gamma
    config = theirs.draft_model_config.hf_config
    assert config.num_hidden_layers == ours.num_layers
    assert config.draft_vocab_size == ours.draft_vocab_size
    assert config.dflash_config["mask_token_id"] == ours.mask_token_id
    tapped = config.dflash_config.get("target_layer_ids")
    assert [layer - ours.first_layer_id for layer in ours.layer_ids] == list(tapped)
    assert theirs.draft_model_config.quantization is None


def test_every_drafter_has_a_target() -> None:
    assert {find_drafter(name) for name in TARGETS} - {None} == set(DRAFTERS)


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_read_by_transformers(name: str) -> None:
    """What the resolution of layers says is what transformers has, for every config that is Laguna's own."""
    from transformers import LagunaConfig

    config = read_config(name)
    if config.get("model_type") == "laguna" and config["num_experts"]:
        assert LagunaConfig(**config).mlp_layer_types == resolve_layer_kinds(config)


def test_defaults_are_transformers() -> None:
    from transformers import LagunaConfig

    config = LagunaConfig()
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS
    assert config.rope_parameters == DEFAULT_ROPE
    assert config.mlp_layer_types == resolve_layer_kinds({})


def make_dense(path: Path, changes: dict[str, Any]) -> Path:
    """The toy's dense checkpoint with its layers' kinds in another spelling."""
    source = Path(TOKENIZER).with_name("dense")
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("spelling", DENSE_SPELLINGS)
def test_dense_in_any_spelling_is_dense_for_vllm(tmp_path: Path, spelling: str) -> None:
    path = make_dense(tmp_path / "dense", DENSE_SPELLINGS[spelling])
    ours = read_target(path)
    assert ours.dense
    overrides = choose_overrides(EngineConfig(str(path)), ours)
    model = make_model_config(str(path), overrides)
    assert model.architectures == ["LagunaDenseForCausalLM"]
    assert model.hf_config.mlp_layer_types == ["dense"] * 6 or model.hf_config.num_experts == 0


def test_rope_theta_alone_reaches_vllm(tmp_path: Path) -> None:
    path = make_dense(tmp_path / "dense", {"rope_parameters": None, "rope_theta": 123_456.0})
    stock = make_model_config(str(path)).hf_config.rope_parameters
    assert stock == DEFAULT_ROPE, "transformers reads rope_theta alone: retire `find_dropped_rope` for targets"
    overrides = choose_overrides(EngineConfig(str(path)), read_target(path))
    found = make_model_config(str(path), overrides).hf_config.rope_parameters
    assert found["rope_theta"] == 123_456.0


def test_older_rope_scaling_is_read_by_transformers(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096}
    path = make_dense(tmp_path / "dense", {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": scaling})
    assert read_target(path).overrides == {}
    found = make_model_config(str(path)).hf_config.rope_parameters
    assert "yarn" in json.dumps(found)


def test_stock_does_not_take_a_sliding_window_of_0() -> None:
    """When this fails, vLLM starts with M.1's config as it is: retire that override in checkpoint/target.py."""
    assert read_config("Laguna-M.1")["sliding_window"] == 0
    with pytest.raises(Exception, match="sliding_window"):
        make_model_config(folder("Laguna-M.1"))
