"""Requests for routes that an engine of the gateway's own lacks do not load it, where that can be known."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from residence_fakes import ask, list_engines, owning

from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.residence import routes
from laguna_serve.serving.gateway.residence.routes import AUDIO, DIFFUSION, POOLING, Routes, foresee
from laguna_serve.serving.gateway.wire.paths import ANSWERED

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests/toy"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
GENERATING = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations"]


def write(folder: Path, config: dict[str, Any] = LLAMA, **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def foresee_folder(folder: Path, *extra_args: str) -> frozenset[str] | None:
    return foresee(OwnedEngine(model=str(folder), extra_args=extra_args))


def test_what_generates_text_lacks_the_routes_of_other_kinds(tmp_path: Path) -> None:
    for folder in (TOY / "teacher", write(tmp_path / "llama")):
        assert foresee_folder(folder) == POOLING | AUDIO
        assert not (POOLING | AUDIO) & {*GENERATING}
    assert POOLING | AUDIO | DIFFUSION <= ANSWERED


@pytest.mark.parametrize(
    "extra_args",
    [("--runner", "pooling"), ("--convert=embed",), ("--conv", "embed"), ("--hf_overrides", "{}"), ("--config", "x")],
)
def test_what_a_flag_makes_another_kind_of_is_not_foreseen(extra_args: tuple[str, ...]) -> None:
    assert foresee_folder(TOY / "teacher", *extra_args) is None
    assert foresee_folder(TOY / "teacher", "--max-num-batched-tokens", "--enforce-eager", "-1") is not None


def test_what_may_be_of_another_kind_is_not_foreseen(tmp_path: Path) -> None:
    sentence = write(tmp_path / "sentence")
    (sentence / "modules.json").write_text("[]")
    other = write(tmp_path / "other", architectures=["WhisperForConditionalGeneration"])
    assert foresee_folder(sentence) is foresee_folder(other) is foresee_folder(tmp_path / "none") is None
    assert foresee(OwnedEngine(model="org/never-fetched")) is None


def test_masked_diffusion_has_the_routes_of_its_server() -> None:
    folder = next(path.parent for path in sorted(TOY.rglob("config.json")) if '"llada"' in path.read_text().lower())
    assert foresee_folder(folder) == ANSWERED - DIFFUSION
    server = (ROOT / "plugins/diffusion/server/app.py").read_text()
    assert set(re.findall(r'@app\.post\("(/[^"]*)"', server)) == DIFFUSION


@pytest.mark.vllm
def test_pooling_and_audio_are_vllms() -> None:
    """When this fails, vLLM has another one of these kinds, or has moved it."""
    folder = Path(str(find_spec("vllm").origin)).parent / "entrypoints"  # type: ignore[union-attr]
    route = re.compile(r'@router\.post\(\s*"(/[^"{]*)')
    found = [
        {path for file in (folder / kind).rglob("*.py") for path in route.findall(file.read_text())}
        for kind in ("pooling", "speech_to_text")
    ]
    assert found == [POOLING, AUDIO]


def test_request_for_a_route_that_the_model_lacks_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TOY / "teacher", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    models = {"a": {"model": str(folder)}}
    with owning(monkeypatch, tmp_path, models, server={"extra_paths": ["/v1/score"]}) as front:
        for path in ("/v1/embeddings", "/v1/embeddings/", "/rerank"):
            reply = front.ask(path, b'{"model": "a", "input": "x"}')
            assert (reply.status, reply.json()["error"]["code"]) == (404, "unknown_url")
            assert reply.json()["error"]["message"] == (
                f"There is no route POST {path} for the model `a`: its engine does not have it."
            )
        model = front.relay.owner.find("a")
        assert (model.state, model.loads) == ("unloaded", 0)
        assert not list_engines()
        metrics = front.ask("/metrics").body.decode()
        assert 'reason="unserved_path"' in metrics
        known = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE))
        shown = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (\w+)", metrics, re.MULTILINE)}
        assert {name for name in shown if not name.startswith("laguna_gateway_process_")} <= known
        assert front.relay.owner.routes.find_absent(None) == frozenset()


@pytest.mark.slow
def test_what_an_engine_lacks_is_remembered_when_it_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = {"extra_args": ["--routes", "/v1/completions,/v1/score"]}
    with owning(monkeypatch, tmp_path, {"a": arguments, "b": {}}) as front:
        assert front.ask("/v1/embeddings", b'{"model": "a"}').json()["error"]["message"] == "no such route"
        front.wait_idle()
        assert ask(front, "b").status == 200  # there is room for one
        front.wait_idle()
        again = front.ask("/v1/embeddings", b'{"model": "a"}')
        assert (again.status, again.json()["error"]["code"]) == (404, "unknown_url")
        assert front.relay.owner.find("a").loads == 1
        assert front.ask("/v1/embeddings", b'{"model": "b"}').status == 404
        assert ask(front, "a").status == 200
        front.wait_idle()
        assert front.ask("/v1/embeddings", b'{"model": "b"}').json()["error"]["message"] == "no such route"


def test_engine_that_does_not_list_its_routes_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, table = Routes(), OwnedEngine(model="org/never-fetched")
    answers = iter([None, POOLING])
    monkeypatch.setattr(routes, "ask", lambda _: next(answers))
    for expected in (frozenset(), POOLING, POOLING):
        found.learn(table, "http://127.0.0.1:1")
        assert found.find_absent(table) == expected


def test_address_where_nobody_answers_tells_nothing() -> None:
    assert routes.ask("http://127.0.0.1:9") is None
