"""Does a drafter fit its target, how far may it draft, what is worth a warning; each with its own line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import DRAFTER, SPECULATORS, TARGET, MakeCheckpoint, write_drafter_weights

from laguna_serve.serving.checkpoint import CheckpointError, read_target
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.support import check_support
from laguna_serve.serving.speculation.drafting import check_fit, list_warnings, resolve_gamma, speculative_config

TOY = Path(__file__).resolve().parents[2] / "toy"
RELEASES = Path(__file__).resolve().parents[2] / "fixtures" / "releases"
MASKS = {"expert_pruning": {"block_size": 64, "blocks_per_expert": 8, "kept_blocks": [96] * 5}}


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
        (
            DRAFTER,
            {"draft_vocab_size": 4096},
            "expected to draft all of the target's 1024 tokens, whose head it shares, got 4096",
        ),
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
        (
            SPECULATORS,
            {"aux_hidden_state_layer_ids": [0, 2, 5]},
            r"got \[0\]; these ids count from 0, this format counts from 1: add 1 to each if so it was trained",
        ),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [1, 6], "mask_token_id": 3}},
            r"got \[6\]; these ids count from 1, this format counts from 0: subtract 1 from each if so it was trained",
        ),
        (
            DRAFTER,
            {"dflash_config": {"target_layer_ids": [1, 1], "mask_token_id": 3}},
            r"expected different target layer ids from 0 to 5, got \[1, 1\]",
        ),
        (SPECULATORS, {"draft_vocab_size": 2048}, "expected at most 1024 draft tokens, got 2048"),
        (
            SPECULATORS,
            {
                "target_hidden_size": 160,
                "transformer_layer_config": {**SPECULATORS["transformer_layer_config"], "hidden_size": 128},
            },
            "expected layers as wide as the target's 160, whose embedding they share, got 128",
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


def test_config_for_plain_vllm(target: Path, drafter: Path) -> None:
    expected = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 7}
    assert speculative_config(str(drafter), str(target)) == expected
    assert speculative_config(str(drafter), gamma=2) == expected | {"num_speculative_tokens": 2}
    drawn = speculative_config(str(drafter), sampling="probabilistic")
    assert drawn == expected | {"draft_sample_method": "probabilistic"}


def test_config_for_plain_vllm_is_checked(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    other = make_checkpoint("other", DRAFTER, vocab_size=2048)
    write_drafter_weights(other)
    with pytest.raises(CheckpointError, match="expected the target's vocabulary 1024, got 2048"):
        speculative_config(str(other), str(target))
    with pytest.raises(CheckpointError, match="expected 1 to 7"):
        speculative_config(str(other), gamma=8)


@pytest.mark.parametrize("draft", ["dflash", "dflash-speculators"])
@pytest.mark.parametrize("model", ["teacher", "dense"])
def test_toy_drafters_fit_teacher_and_student(draft: str, model: str) -> None:
    assert speculative_config(str(TOY / draft), str(TOY / model))["num_speculative_tokens"] == 7


def warnings(target: Path, drafter: Path, **changes: Any) -> list[str]:
    asked = {"dtype": "auto", "max_model_len": None, "pruned": False} | changes
    return list_warnings(read_target(target), read_drafter(drafter), **asked)


def test_nothing_is_said_of_a_pair_that_belongs_together(target: Path, drafter: Path) -> None:
    assert warnings(target, drafter) == []
    assert warnings(TOY / "teacher", TOY / "dflash") == []
    assert warnings(TOY / "teacher", TOY / "dflash-speculators") == []


@pytest.mark.parametrize(
    ("model", "draft", "pruned", "message"),
    [
        ("dense", "dflash", False, "does not say what it was trained for, drafts for a dense model; the output stays"),
        ("dense", "dflash-speculators", False, "trained for teacher, drafts for .*dense; the output stays"),
        ("teacher", "dflash", True, "drafts for a pruned model"),
        ("teacher", "dflash-speculators", True, "trained for teacher, drafts for .*teacher with its experts pruned"),
    ],
)
def test_drafter_of_another_model_is_named(model: str, draft: str, pruned: bool, message: str) -> None:
    lines = warnings(TOY / model, TOY / draft, pruned=pruned)
    assert len(lines) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(lines[0])


def test_verifier_of_a_hub_id_is_recognised(drafter: Path, target: Path) -> None:
    read = replace(read_drafter(drafter), verifier="poolside/Laguna-XS.2")
    cached = "/cache/hub/models--poolside--Laguna-XS.2/snapshots/abc"
    asked: dict[str, Any] = {"dtype": "auto", "max_model_len": None, "pruned": False}
    for name, count in ((cached, 0), ("/models/laguna-xs.2", 0), ("/models/laguna-xs.2-dense", 1)):
        assert len(list_warnings(replace(read_target(target), name=name), read, **asked)) == count


@pytest.mark.parametrize(
    ("model", "draft", "message"),
    [
        ("Laguna-XS-2.1", "Laguna-XS-2.1-DFlash", None),
        ("Laguna-XS-2.1-FP8", "Laguna-XS-2.1-DFlash-FP8", None),
        ("Laguna-XS-2.1-INT4", "Laguna-XS-2.1-DFlash-INT4", None),
        ("Laguna-S-2.1-NVFP4", "Laguna-S-2.1-DFlash-NVFP4", None),
        ("Laguna-XS-2.1-NVFP4", "Laguna-XS-2.1-DFlash", None),  # neither is rotated
        ("Laguna-XS-2.1-FP8", "Laguna-XS-2.1-DFlash", "is not named for it, and the hidden states of .* are rotated"),
        (
            "Laguna-XS-2.1-FP8",
            "Laguna-XS-2.1-DFlash-INT4",
            "is named for INT4, and the hidden states of .* are rotated",
        ),
        ("Laguna-XS-2.1", "Laguna-XS-2.1-DFlash-FP8", "is named for FP8, .* and drafts for bf16; next to nothing"),
        ("Laguna-XS.2-FP8", "Laguna-XS.2-speculator.dflash", "is not named for it, .* next to nothing"),
        ("Laguna-XS.2-NVFP4", "Laguna-XS.2-speculator.dflash", None),
    ],
)
def test_drafter_for_another_form_of_a_release_is_named(model: str, draft: str, message: str | None) -> None:
    """Their hidden states are rotated, or not: nothing else of either config differs, and nothing would be accepted."""
    lines = [line for line in warnings(RELEASES / model, RELEASES / draft) if "next to nothing" in line]
    assert len(lines) == (message is not None)
    assert message is None or re.search(message, lines[0])


@pytest.mark.parametrize(("rotated", "count"), [(True, 0), (False, 1), (None, 1)])
def test_drafter_that_says_what_it_was_trained_on_is_believed(rotated: bool | None, count: int, tmp_path: Path) -> None:
    """`laguna drafter train` says it: the folder may have any name."""
    path = tmp_path / "my-drafter"
    path.mkdir()
    config = json.loads((RELEASES / "Laguna-XS-2.1-DFlash-FP8" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | ({} if rotated is None else {"target_rotated": rotated})))
    lines = [line for line in warnings(RELEASES / "Laguna-XS-2.1-FP8", path) if "next to nothing" in line]
    assert len(lines) == count


def test_rotation_outlives_what_it_was_quantised_with(make_checkpoint: MakeCheckpoint) -> None:
    described = json.loads((RELEASES / "Laguna-XS.2-FP8" / "config.json").read_text())["quantization_config"]
    rotated = make_checkpoint("rotated", TARGET, transform_config=described["transform_config"])
    assert read_target(rotated).rotated


@pytest.mark.parametrize(
    "other", [{}, {"config_groups": {}}, {"config_groups": {"R": 1}}, {"config_groups": {"R": {"apply": [{}]}}}, []]
)
def test_what_rotates_nothing_is_no_rotation(make_checkpoint: MakeCheckpoint, other: object) -> None:
    assert not read_target(make_checkpoint("plain", TARGET, transform_config=other)).rotated


def test_compact_target_is_known_as_pruned(make_checkpoint: MakeCheckpoint, drafter: Path) -> None:
    compact = make_checkpoint("compact", TARGET, **MASKS)
    assert "drafts for a pruned model" in warnings(compact, drafter)[0]


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"max_position_embeddings": 1024}, {}, "was trained for positions up to 1024, 2048 are served"),
        ({"max_position_embeddings": 1024}, {"max_model_len": 1024}, None),
        ({}, {"dtype": "half"}, "stored as bfloat16, served as half like the target"),
        ({"dtype": "float16"}, {"dtype": "float16"}, None),
    ],
)
def test_costs_are_named(
    make_checkpoint: MakeCheckpoint, target: Path, changes: dict[str, Any], asked: dict[str, Any], message: str | None
) -> None:
    lines = warnings(target, make_checkpoint("drafter", DRAFTER, **changes), **asked)
    assert [line for line in lines if message is None or message in line] == lines
    assert len(lines) == (message is not None)


def test_mixed_layers_are_named(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    layers = SPECULATORS["transformer_layer_config"]
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512}
    mixed = make_checkpoint("mixed", SPECULATORS, transformer_layer_config={**layers, **kinds})
    assert "V2 model runner" in warnings(target, mixed)[0]


def test_mixed_layers_are_refused_on_a_cpu_alone(make_checkpoint: MakeCheckpoint) -> None:
    layers = SPECULATORS["transformer_layer_config"]
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512}
    mixed = read_drafter(make_checkpoint("mixed", SPECULATORS, transformer_layer_config={**layers, **kinds}))
    check_support(None, mixed, Device("gpu", "gpu", 1, 1, capability=90))
    with pytest.raises(CheckpointError, match=r"expected layers of one kind on a CPU.*got sliding and full"):
        check_support(None, mixed, Device("cpu", "cpu", 1, 1))


def test_a_drafter_of_another_depth_is_refused(make_checkpoint: MakeCheckpoint, target: Path) -> None:
    dflash = {**DRAFTER["dflash_config"], "num_target_layers": 7}
    other = read_drafter(make_checkpoint("drafter", DRAFTER, dflash_config=dflash))
    with pytest.raises(CheckpointError, match="expected a target of 7 layers, as its num_target_layers says, got 6; "):
        check_fit(read_target(target), other)


@pytest.mark.parametrize(("inner", "outer", "agree"), [(8, 8, True), (8, 4, False), (None, 8, True), (8, None, True)])
def test_two_block_sizes_must_agree(
    make_checkpoint: MakeCheckpoint, inner: int | None, outer: int | None, agree: bool
) -> None:
    dflash = {**DRAFTER["dflash_config"], "block_size": inner}
    folder = make_checkpoint("drafter", DRAFTER, dflash_config=dflash, block_size=outer)
    if agree:
        assert read_drafter(folder).block_size == 8
    else:
        with pytest.raises(
            CheckpointError, match=r"expected block_size to be the 8 of dflash_config.block_size, got 4"
        ):
            read_drafter(folder)
