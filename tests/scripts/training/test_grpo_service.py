"""What a run is told where the gateway's admin port does not take its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.scripts.training.rl.service import TrainingService, UpdateRefusedError, describe_refusal
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.run import open_background
from laguna_serve.serving.kit.results import JsonObject


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (("a", "b"), "version v1: expected it to be served, got 400: The query parameter 'model' is missing"),
        (("a",), "version v1: expected it to be served, got unchanged: /weight_info: engine: "),
    ],
    ids=["error", "report"],
)
def test_refusal_is_told_in_words(tmp_path: Path, models: tuple[str, ...], words: str) -> None:
    tables: JsonObject = {"server": {"port": 0}, "admin": {"port": 0}, "models": []}
    for number, name in enumerate(models):
        upstream = {"name": "engine" if not number else name, "url": "http://127.0.0.1:1"}
        tables["models"].append({"name": name, "upstreams": [upstream]})
    with open_background(parse_config(tables, "test")) as (url, admin_url, _):
        service = TrainingService(url, admin_url.rstrip("/"), "", "a", list)
        with pytest.raises(UpdateRefusedError) as refused:
            service.push("v1", tmp_path, {}, tmp_path)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<h1>Bad Gateway</h1>", "HTTP 502: <h1>Bad Gateway</h1>"),
        (b"\xff", "HTTP 502: \N{REPLACEMENT CHARACTER}"),
        (b"[1]", "HTTP 502: [1]"),
        (b'{"error": {}}', "502: "),
        (b'{"outcome": "rolled back", "error": "no"}', "rolled back: no"),
    ],
)
def test_answer_that_is_no_report_is_shown(answer: bytes, words: str) -> None:
    assert describe_refusal(502, answer) == words


def test_gateway_that_is_not_there_is_named(tmp_path: Path) -> None:
    service = TrainingService("", "http://127.0.0.1:1", "", "a", list)
    with pytest.raises(UpdateRefusedError, match=r"127.0.0.1:1/admin/update_weights: expected an answer, got "):
        service.push("v1", tmp_path, {}, tmp_path)
