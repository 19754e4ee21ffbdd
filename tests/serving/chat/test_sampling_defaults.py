"""What a release says of requests that state no temperature, and what becomes known of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laguna_serve.serving.chat.sampling_defaults import find_temperature
from laguna_serve.serving.service.front import FrontSettings, make_config

FILES = ("config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, {"temperature": 0.7, "top_k": 20}, 0.7),
        ({}, {"temperature": 0}, 0.0),
        ({}, {"top_k": 20}, 1.0),
        ({}, None, 1.0),
        ({"temperature": 0.5}, None, 0.5),
        ({"temperature": 0.5}, {"top_k": 20}, 1.0),
        ({}, {"temperature": "warm"}, None),
    ],
)
def test_it_is_the_releases(tmp_path: Path, config: object, generation: object, found: float | None) -> None:
    for name, value in zip(FILES, (config, generation), strict=True):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert find_temperature(str(tmp_path), ("--max-num-batched-tokens", "512")) == found


@pytest.mark.parametrize(
    "extra",
    [
        ("--generation-config", "vllm"),
        ("--generation-config=vllm",),
        ("--override-generation-config.temperature=0.2",),
        ("--override_generation_config", "{}"),
        ("--config", "more.yaml"),
    ],
)
def test_other_defaults_are_not_the_releases(tmp_path: Path, extra: tuple[str, ...]) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert find_temperature(str(tmp_path), extra) is None


def test_what_is_not_here_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("no JSON")
    for model in (str(tmp_path), str(tmp_path / "none"), "org/not-fetched"):
        assert find_temperature(model, ()) is None


def test_the_gateway_of_laguna_serve_knows_that_of_its_engine() -> None:
    config = make_config(FrontSettings(model="m", max_num_seqs=1, temperature=0.7), "http://127.0.0.1:7")
    assert config.models[0].upstreams[0].default_temperature == 0.7
