"""Every way in which a checkpoint can be wrong has one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import DRAFTER, TARGET, MakeCheckpoint

from laguna_serve.serving.checkpoint import (
    CheckpointError,
    find_folder,
    name_checkpoint,
    read_target,
    require_folder,
)
from laguna_serve.serving.checkpoint.folder import check_pruning_files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nobody-of-that-name/model", "^~nobody-of-that-name/model: expected an existing folder or a hub id"),
        ("a" * 300, r"^'a+ … a+': expected a folder that can be read, got File name too long; check the path$"),
        ("a/" * 3000, "expected a folder that can be read, got File name too long; check the path$"),
    ],
    ids=["home", "name", "path"],
)
def test_names_that_can_be_no_path_are_refused_in_a_line(name: str, message: str) -> None:
    assert name_checkpoint(name) == name
    with pytest.raises(CheckpointError, match=message):
        find_folder(name)


def test_folder_of_somebody_else_is_refused_in_a_line(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(CheckpointError, match="expected a folder that can be read, got Permission denied; check the "):
        find_folder(str(target))


@pytest.mark.parametrize("path", ["~nobody-of-that-name/mask.npy", "m" * 300])
def test_pruning_files_that_can_be_no_path_are_refused_in_a_line(path: str) -> None:
    with pytest.raises(CheckpointError, match="expected a file, got none; check the path"):
        check_pruning_files(path, path)


def test_target_is_read(target: Path) -> None:
    read = read_target(target)
    assert (read.vocab_size, read.hidden_size, read.num_layers, read.max_model_len) == (1024, 160, 6, 2048)
    assert (read.dtype, read.kv_values_per_token) == ("bfloat16", 2 * 6 * 2 * 32)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            TARGET,
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "got LlamaForCausalLM, model_type 'llama'",
        ),
        (DRAFTER, {}, "expected a Laguna model, got a DFlash drafter"),
        (TARGET, {"hidden_size": "160"}, "expected hidden_size to be an integer, got '160'"),
    ],
    ids=["llama", "drafter", "hidden-size"],
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
    for alone, remedy in (
        (False, "hf download poolside/Laguna-XS.2"),
        (True, "hf download poolside/Laguna-XS.2 config.json"),
    ):
        with pytest.raises(CheckpointError) as caught:
            require_folder("poolside/Laguna-XS.2", config_alone=alone)
        assert str(caught.value).endswith(f"download it first: {remedy}")
    repository = tmp_path / "hub" / "models--poolside--Laguna-XS.2"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    (snapshot / "config.json").write_text(json.dumps(TARGET), encoding="utf-8")
    assert find_folder("poolside/Laguna-XS.2") == snapshot


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", ["bf16", "auto", "torch.bfloat16", 16])
def test_dtype_that_torch_has_not_is_named(tmp_path: Path, key: str, name: object) -> None:
    config = {**{other: value for other, value in TARGET.items() if other != "dtype"}, key: name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"expected {key} to be a name as 'bfloat16', got "):
        read_target(tmp_path)
