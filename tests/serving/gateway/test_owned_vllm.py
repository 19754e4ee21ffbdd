"""Two toy models on a budget with room for one, in real engines that the gateway starts and ends."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from gateway_fakes import gateway

from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.residence import routes
from laguna_serve.serving.gateway.residence.routes import AUDIO, POOLING

TOY = Path(__file__).parents[2] / "toy"
pytestmark = pytest.mark.vllm


def list_engines() -> set[int]:
    """The engine cores of this process; other tests may have left some of theirs to it."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "VLLM" in " ".join(child.cmdline())}


def test_two_toy_models_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = {"eager": True, "kv_cache_gib": 1.5, "max_num_seqs": 8, "max_model_len": 256, "memory_gib": 3.0}
    models = [{"name": name, "engine": {**engine, "model": str(TOY / name)}} for name in ("teacher", "dense")]
    groups = [{"name": "default", "memory_gib": 3.0}]
    answers: dict[str, set[str]] = {"teacher": set(), "dense": set()}
    before = list_engines()
    with gateway(models=models, groups=groups, limits={"heartbeat_s": 1.0, "load_timeout_s": 400.0}) as front:
        for name in ("teacher", "dense", "teacher", "dense"):
            body = {"model": name, "prompt": "def add(a, b):\n", "temperature": 0, "max_tokens": 8, "stream": True}
            with front.connect() as connection:
                connection.settimeout(400)
                data = json.dumps(body).encode()
                head = (
                    f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
                )
                head += "content-type: application/json\r\n\r\n"
                connection.sendall(head.encode() + data)
                said = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
            assert "data: [DONE]" in said
            assert ": the model is being loaded" in said
            events = [line.partition("data: ")[2] for line in said.splitlines() if line.startswith("data: {")]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
            answers[name].add(text)
            front.wait_idle(30)
            # The other one goes when its room is needed: together they take more than the budget.
            model = front.relay.owner.find(name)
            assert model.state == "ready"
            assert 0 < model.measured_bytes < 3 << 30
            # What was known of it before it was loaded is so.
            (running,), (table,) = front.relay.pools[name].engines, [m["engine"] for m in models if m["name"] == name]
            lacking = routes.ask(running.config.url)
            assert lacking is not None
            assert routes.foresee(OwnedEngine(**table)) == lacking & (POOLING | AUDIO) == POOLING | AUDIO
            assert not lacking & {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"}
        owned = front.relay.owner.scheduler.models
        assert [len(found) for found in answers.values()] == [1, 1]
        print(
            {name: (model.loads, model.measured_bytes >> 20, model.load_seconds.mean) for name, model in owned.items()}
        )
    assert list_engines() <= before
