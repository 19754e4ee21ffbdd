"""What a generation_config.json may say, and that doctor, serve and the gateway refuse what it may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from release_cases import TARGETS, folder

from laguna_serve.serving.chat.generation import check_generation
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.cli import main
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect

ODD: list[Any] = ["hot", {}, [], True, float("nan"), -3, 10**400]


def write(place: Path, content: Any) -> Path:
    (place / "generation_config.json").write_text(json.dumps(content))
    return place


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize(
    "key", ["temperature", "top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
def test_odd_sampling_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json: expected {key} to be .*, got .*; correct it"):
        check_generation(write(tmp_path, {key: value}))
    check_generation(tmp_path, sampling=False)


@pytest.mark.parametrize("value", [{}, "2", [1, "2"], -1, 1.5, True, [[2]]], ids=str)
def test_odd_ends_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="expected eos_token_id to be a token id, or a list of them, got "):
        check_generation(write(tmp_path, {"eos_token_id": value}), sampling=False)


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": 0, "top_p": 1, "min_p": 0.0, "top_k": -1, "repetition_penalty": 1.1, "eos_token_id": []},
        {"temperature": None, "eos_token_id": None, "max_new_tokens": 1, "presence_penalty": -2},
    ],
)
def test_what_vllm_takes_passes(tmp_path: Path, content: Any) -> None:
    check_generation(write(tmp_path, content))


@pytest.mark.parametrize("name", TARGETS)
def test_published_files_pass(name: str) -> None:
    check_generation(Path(folder(name)))


@pytest.mark.parametrize("content", [{"temperature": "hot"}, {"eos_token_id": {}}, [1]], ids=str)
def test_doctor_and_serve_refuse_in_a_line(
    content: Any, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write(Path(shutil.copytree(target, tmp_path / "model")), content)
    for command in ("doctor", "serve"):
        assert main([command, str(place), *(["--dry-run"] if command == "serve" else [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"laguna: error: {place}/generation_config.json: expected ")


def test_flags_say_which_file_counts(target: Path, tmp_path: Path) -> None:
    place = write(Path(shutil.copytree(target, tmp_path / "model")), {"temperature": "hot"})
    inspect(EngineConfig(str(place), extra_args=("--generation-config", "vllm")))
    other = write(tmp_path, {"top_p": 0})
    with pytest.raises(CheckpointError, match="expected top_p to be a number above 0"):
        inspect(EngineConfig(str(place), extra_args=("--generation-config", str(other))))
