"""A drafter's config and weights in both formats: what is read, and every way in which they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from serving_fakes import DRAFTER, SPECULATORS, TARGET, MakeCheckpoint, write_drafter_weights

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.checkpoint.parameters import count_drafter
from laguna_serve.serving.checkpoint.stored.drafter_weights import check_weights

TOY = Path(__file__).resolve().parents[2] / "toy"
LAYERS: dict[str, Any] = SPECULATORS["transformer_layer_config"]
# As DFlash's authors publish a drafter for Qwen3-8B: a block of 16, five layers of the target's sizes.
ORIGINAL: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
Tensors = dict[str, npt.NDArray[Any]]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TARGET, {}, "expected a DFlash drafter, got LagunaForCausalLM"),
        (DRAFTER, {"block_size": None}, "expected dflash_config.block_size to be an integer, got nothing"),
        (DRAFTER, {"block_size": "8"}, "expected block_size to be an integer, got '8'"),
        (DRAFTER, {"dflash_config": None}, "expected dflash_config in config.json, got none"),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": "all"}},
            "dflash_config.target_layer_ids to be a list of integers",
        ),
        (SPECULATORS, {"transformer_layer_config": None}, "expected transformer_layer_config in config.json, got none"),
        (SPECULATORS, {"speculators_model_type": "eagle3"}, "expected a DFlash drafter, got speculators type 'eagle3'"),
    ],
)
def test_unreadable_drafter_is_named(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_drafter(make_checkpoint("drafter", config, **changes))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            DRAFTER,
            {"architectures": ["DFlash2DraftModel"]},
            "expected DFlashLagunaForCausalLM, DFlashDraftModel or the speculators format, got .'DFlash2DraftModel'",
        ),
        (DRAFTER, {"layer_types": ["full_attention"]}, "expected layer_types to be 2 of"),
        (
            DRAFTER,
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
            "expected layer_types to be of one kind",
        ),
        (DRAFTER, {"num_attention_heads_per_layer": [4]}, "expected num_attention_heads_per_layer to be 2 integers"),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [1], "mask_token_id": 3, "sample_from_anchor": True}},
            "expected dflash_config.sample_from_anchor to be false",
        ),
        (
            DRAFTER,
            {"dflash_config": {**DRAFTER["dflash_config"], "sequential_head": {"rank": 0}}},
            r'expected dflash_config.sequential_head to be {"rank": an integer from 1 on}, got {.rank.: 0}',
        ),
        (
            SPECULATORS,
            {"sequential_head": {"rank": 8}},
            "expected no sequential_head in the speculators format, got one",
        ),
        (SPECULATORS, {"sample_from_anchor": True}, "expected sample_from_anchor to be false"),
        (DRAFTER, {"sliding_windows": [[512]]}, "expected sliding_windows to be sliding_window's"),
        (ORIGINAL, {"model_type": "llama"}, "expected model_type to be 'qwen3'"),
        (
            ORIGINAL,
            {"dflash_config": {**ORIGINAL["dflash_config"], "block_size": 8}},
            "expected block_size to be the 8",
        ),
        (ORIGINAL, {"sample_from_anchor": True}, "expected dflash_config.sample_from_anchor to be false"),
        (ORIGINAL, {"sequential_head": {"rank": 8}}, "expected no sequential_head in DFlashDraftModel, got one"),
        (
            SPECULATORS,
            {"transformer_layer_config": {**LAYERS, "model_type": "llama"}},
            "expected transformer_layer_config.model_type to be 'qwen3'",
        ),
        (
            SPECULATORS,
            {"transformer_layer_config": {**LAYERS, "layer_types": ["sparse"] * 2}},
            "expected transformer_layer_config.layer_types to be 2 of",
        ),
    ],
)
def test_layers_that_vllm_has_not_are_named(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_drafter(make_checkpoint("drafter", config, **changes))


def test_toy_drafters_are_read() -> None:
    own, speculators = read_drafter(TOY / "dflash"), read_drafter(TOY / "dflash-speculators")
    assert (own.format, own.layer_ids, own.first_layer_id, own.verifier) == ("laguna", (1, 3, 4, 5), 0, None)
    assert (speculators.format, speculators.layer_ids, speculators.first_layer_id) == ("speculators", (2, 4, 6), 1)
    assert (speculators.draft_vocab_size, speculators.target_vocab_size, speculators.verifier) == (256, 512, "teacher")
    for drafter in (own, speculators):
        check_weights(Path(drafter.name), drafter)


def test_dflashs_own_format_is_read(make_checkpoint: MakeCheckpoint) -> None:
    drafter = read_drafter(make_checkpoint("drafter", ORIGINAL))
    assert (drafter.format, drafter.layer_ids, drafter.first_layer_id) == ("dflash", (1, 9, 17, 25, 33), 0)
    assert (drafter.max_gamma, drafter.mask_token_id, drafter.target_layers) == (15, 151669, 36)
    assert drafter.draft_vocab_size == drafter.target_vocab_size == 151936
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    assert count_drafter(drafter) == 5 * layer + 5 * 4096 * 4096 + 2 * 4096
    inner = {**ORIGINAL["dflash_config"], "block_size": 8, "num_target_layers": 40}
    newer = read_drafter(
        make_checkpoint("newer", ORIGINAL, block_size=None, num_target_layers=None, dflash_config=inner)
    )
    assert (newer.block_size, newer.target_layers) == (8, 40)


@pytest.mark.parametrize("gating", [True, "per-head", "per-element", False])
def test_every_spelling_of_the_gate(make_checkpoint: MakeCheckpoint, gating: bool | str) -> None:
    folder = make_checkpoint("drafter", DRAFTER, gating=gating)
    write_drafter_weights(folder)
    check_weights(folder, read_drafter(folder))
    widths = {True: 4, "per-head": 4, "per-element": 4 * 32}
    gate = load_file(folder / "model.safetensors").get("layers.0.self_attn.g_proj.weight")
    assert (gate is None) == (gating is False)
    assert gate is None or gate.shape == (widths[gating], 160)


def change(folder: Path, action: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    action(tensors)
    save_file(tensors, folder / "model.safetensors")


def move(place: int, value: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors["d2t"].__setitem__(place, value)


@pytest.mark.parametrize(
    ("config", "action", "message"),
    [
        (DRAFTER, lambda t: t.pop("fc.weight"), r"expected tensor fc.weight \[160, 480\], got none"),
        (DRAFTER, lambda t: t.pop("aux_hidden_norms.2.weight"), r"expected tensor aux_hidden_norms.2.weight \[160\]"),
        (
            DRAFTER,
            lambda t: t.update({"fc.weight": np.zeros((160, 640), np.float16)}),
            r"expected fc.weight \[160, 480\], got \[160, 640\]; is config.json that of these weights",
        ),
        (
            DRAFTER,
            lambda t: t.update({"layers.0.self_attn.q_proj.weight": t.pop("layers.0.self_attn.qkv_proj.weight")}),
            "queries, keys and values in one, got q_proj; join the three",
        ),
        (
            DRAFTER,
            lambda t: t.update({"norm.weight": t["norm.weight"].astype(np.int8)}),
            "expected norm.weight in BF16, F16, F32, as config.json has no quantization_config, got I8",
        ),
        (SPECULATORS, lambda t: t.pop("lm_head.weight"), r"expected tensor lm_head.weight \[512, 160\], got none"),
        (
            SPECULATORS,
            lambda t: t.pop("d2t"),
            "expected d2t, which of the target's 1024 tokens the 512 drafted ones are, got none",
        ),
        (
            SPECULATORS,
            lambda t: t.update(d2t=t["d2t"][:-1]),
            r"expected d2t \[512\], got \[511\]",
        ),
        (SPECULATORS, move(511, 513), "expected d2t to lead to the target's tokens 0 to 1023, got 1024"),
        (SPECULATORS, move(0, -1), "expected d2t to lead to the target's tokens 0 to 1023, got -1"),
        (SPECULATORS, move(1, 1 - 2), "expected d2t to lead to 512 different tokens, got 0 more than once"),
        (SPECULATORS, move(3, 4), "expected t2d to mark the 512 tokens of d2t"),
        (
            SPECULATORS,
            lambda t: t.update({"embed_tokens.weight": np.zeros((512, 160), np.float16)}),
            r"expected embed_tokens.weight \[1024, 160\], got \[512, 160\]",
        ),
    ],
)
def test_weights_that_do_not_fit_their_config_are_named(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any], action: Callable[[Tensors], object], message: str
) -> None:
    folder = make_checkpoint("drafter", config)
    write_drafter_weights(folder)
    check_weights(folder, read_drafter(folder))
    change(folder, action)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_weights(folder, read_drafter(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda t: t.pop("sequential_head.mix.weight"),
            r"expected tensor sequential_head.mix.weight \[16, 16\], got none",
        ),
        (
            lambda t: t.update({"sequential_head.out.weight": np.zeros((9, 8), np.float16)}),
            r"expected sequential_head.out.weight \[\d+, 8\], got \[9, 8\]",
        ),
    ],
)
def test_head_that_does_not_fit_its_config_is_named(
    make_checkpoint: MakeCheckpoint, action: Callable[[Tensors], object], message: str
) -> None:
    dflash = {**DRAFTER["dflash_config"], "sequential_head": {"rank": 8}}
    folder = make_checkpoint("drafter", DRAFTER, dflash_config=dflash)
    write_drafter_weights(folder)
    check_weights(folder, read_drafter(folder))
    change(folder, action)
    with pytest.raises(CheckpointError, match=message):
        check_weights(folder, read_drafter(folder))


def test_head_that_config_json_does_not_name_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """Stock vLLM would end in a KeyError."""
    folder = make_checkpoint("drafter", DRAFTER)
    write_drafter_weights(folder)
    change(folder, lambda t: t.update({"sequential_head.mix.weight": np.zeros((16, 16), np.float16)}))
    with pytest.raises(CheckpointError, match=r"expected dflash_config.sequential_head .*, got none"):
        check_weights(folder, read_drafter(folder))


def test_full_vocabulary_shares_the_targets_head(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("drafter", SPECULATORS, draft_vocab_size=1024)
    write_drafter_weights(folder)
    change(folder, lambda tensors: tensors.pop("lm_head.weight", None))
    check_weights(folder, read_drafter(folder))


def test_file_that_is_cut_off_is_named(drafter: Path) -> None:
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a whole safetensors file"):
        check_weights(drafter, read_drafter(drafter))


def test_folder_without_weights_is_named(drafter: Path) -> None:
    (drafter / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected the drafter's weights"):
        check_weights(drafter, read_drafter(drafter))
    (drafter / "pytorch_model.bin").touch()
    check_weights(drafter, read_drafter(drafter))
