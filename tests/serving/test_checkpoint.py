"""Every way in which a checkpoint can be wrong has one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import DRAFTER, SPECULATORS, TARGET, MakeCheckpoint

from laguna_serve.serving.checkpoint import (
    CheckpointError,
    check_fit,
    find_folder,
    read_drafter,
    read_target,
    resolve_gamma,
    weight_bytes,
)


def test_target_is_read(target: Path) -> None:
    read = read_target(target)
    assert (read.vocab_size, read.hidden_size, read.num_layers, read.max_model_len) == (1024, 160, 6, 2048)
    assert (read.dtype, read.kv_values_per_token) == ("bfloat16", 2 * 6 * 2 * 32)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DRAFTER, {}),
        (SPECULATORS, {}),
        (
            SPECULATORS,
            {"target_hidden_size": 160, "transformer_layer_config": {**SPECULATORS["transformer_layer_config"]}},
        ),
        (DRAFTER, {"dflash_config": {"target_layer_ids": [0, 5], "mask_token_id": 1023}}),
        (SPECULATORS, {"aux_hidden_state_layer_ids": [1, 6]}),
    ],
    ids=["laguna", "speculators", "own-target-hidden-size", "laguna-bounds", "speculators-bounds"],
)
def test_fitting_drafter_passes(
    make_checkpoint: MakeCheckpoint, target: Path, config: dict[str, Any], changes: dict[str, Any]
) -> None:
    drafter = read_drafter(make_checkpoint("drafter", config, **changes))
    check_fit(read_target(target), drafter)
    assert drafter.max_gamma == 7


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DRAFTER, {"vocab_size": 2048}, "expected the target's vocabulary 1024, got 2048"),
        (DRAFTER, {"hidden_size": 128}, "expected the target's hidden size 160, got 128"),
        (DRAFTER, {"draft_vocab_size": 4096}, "expected at most 1024 draft tokens, got 4096"),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [0, 6], "mask_token_id": 3}},
            r"expected target layer ids from 0 to 5, got \[6\]",
        ),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [], "mask_token_id": 3}},
            "expected target layer ids from 0 to 5, got none",
        ),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [0], "mask_token_id": 1024}},
            "expected a mask token from 0 to 1023, got 1024",
        ),
        (
            SPECULATORS,
            {"aux_hidden_state_layer_ids": [0, 6, 7]},
            r"expected target layer ids from 1 to 6, got \[0, 7\]",
        ),
        (SPECULATORS, {"target_hidden_size": 128}, "expected the target's hidden size 160, got 128"),
        (SPECULATORS, {"mask_token_id": -1}, "expected a mask token from 0 to 1023, got -1"),
    ],
)
def test_drafter_that_does_not_fit_is_named(
    make_checkpoint: MakeCheckpoint, target: Path, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    drafter = read_drafter(make_checkpoint("drafter", config, **changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        check_fit(read_target(target), drafter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TARGET, {}, "expected a DFlash drafter, got LagunaForCausalLM"),
        (DRAFTER, {"block_size": None}, "expected block_size to be an integer, got nothing"),
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
            TARGET,
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "got LlamaForCausalLM, model_type 'llama'",
        ),
        (DRAFTER, {}, "expected a Laguna model, got a DFlash drafter"),
        (TARGET, {"hidden_size": None}, "expected hidden_size to be an integer, got nothing"),
    ],
    ids=["llama", "drafter", "no-hidden-size"],
)
def test_target_that_is_not_laguna_is_named(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_target(make_checkpoint("model", config, **changes))


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got a folder without config\.json"):
        read_target(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[]", "expected a JSON object, got list")])
def test_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_target(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "nowhere", "tests/nowhere"])
def test_missing_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(CheckpointError, match="expected an existing folder or a hub id"):
        find_folder(name)


def test_file_is_not_a_checkpoint(target: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, got a file"):
        find_folder(str(target / "config.json"))


def test_hub_id_is_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_folder("poolside/Laguna-XS.2") is None
    repository = tmp_path / "hub" / "models--poolside--Laguna-XS.2"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    (snapshot / "config.json").write_text(json.dumps(TARGET), encoding="utf-8")
    assert find_folder("poolside/Laguna-XS.2") == snapshot


@pytest.mark.parametrize(("gamma", "expected"), [(None, 7), (1, 1), (7, 7)])
def test_gamma_defaults_to_what_was_trained(drafter: Path, gamma: int | None, expected: int) -> None:
    assert resolve_gamma(gamma, read_drafter(drafter)) == expected


@pytest.mark.parametrize(
    ("gamma", "message"),
    [(0, "expected at least 1, got 0"), (-3, "got -3"), (8, r"expected 1 to 7 \(block 8 of .*\), got 8")],
)
def test_gamma_out_of_range_is_refused(drafter: Path, gamma: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_gamma(gamma, read_drafter(drafter))


def test_block_of_one_cannot_draft(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="expected a block of at least 2, got 1"):
        resolve_gamma(None, read_drafter(make_checkpoint("drafter", DRAFTER, block_size=1)))


def test_unknown_drafter_needs_gamma() -> None:
    assert resolve_gamma(3, None) == 3
    with pytest.raises(CheckpointError, match="expected a number for a drafter that is not on this machine"):
        resolve_gamma(None, None)


def test_weight_bytes_are_those_of_the_shards(target: Path) -> None:
    for index in range(2):
        (target / f"model-{index}.safetensors").write_bytes(b"x" * 100)
    assert weight_bytes(target) == 200
