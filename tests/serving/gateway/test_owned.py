"""A gateway that owns its engines, with light engines as real processes."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from gateway_fakes import Upstream, wait_until
from residence_fakes import PATH, ask, list_engines, owning

from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.wire.paths import (
    ANSWERED,
    NEWER,
    NOT_PUBLIC,
    PUBLIC_PATHS,
    PUBLIC_PREFIXES,
    STORED,
    TOLD,
)


@pytest.mark.slow
def test_a_request_starts_its_engine_and_the_next_one_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {}, "b": {}}) as front:
        assert not list_engines()
        first, second = ask(front, "a"), ask(front, "a")
        assert (first.status, first.json()) == (200, second.json())
        assert first.header("x-upstream") == "a"
        other = ask(front, "b")  # there is room for one
        assert other.json()["model"] == "b"
        front.wait_idle()
        assert len(list_engines()) == 2  # a supervisor and its engine
        again = ask(front, "a")
        assert again.json()["model"] == "a"
        assert again.json() != first.json()  # another process


@pytest.mark.slow
def test_what_its_engine_draws_with_is_the_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.7}')
    with owning(monkeypatch, tmp_path, {"a": {"model": str(tmp_path / "model")}}) as front:
        assert ask(front, "a").status == 200
        assert [engine.config.default_temperature for engine in front.relay.pools["a"].engines] == [0.7]


@pytest.mark.slow
def test_a_stream_that_waits_gets_comments_then_its_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = {"extra_args": ["--load", "0.5"]}
    with owning(monkeypatch, tmp_path, {"a": engine}, limits={"heartbeat_s": 0.1}) as front:
        reply = ask(front, "a", stream=True)
        assert reply.status == 200
        assert reply.header("content-type") == "text/event-stream; charset=utf-8"
        assert reply.body.startswith(b": the model is being loaded\n\n")
        assert reply.body.count(b"data: {") == 4
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert not reply.cut
        ready = ask(front, "a", stream=True)
        assert not ready.body.startswith(b":")


@pytest.mark.slow
def test_an_error_after_a_comment_is_the_last_event(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = {"extra_args": ["--load", "0.5"]}
    with owning(monkeypatch, tmp_path, {"a": engine}, limits={"heartbeat_s": 0.1}) as front:
        reply = ask(front, "a", stream=True, prompt="bad")
        assert reply.status == 200
        comments, _, event = reply.body.partition(b"data: ")
        assert set(comments.decode().splitlines()) == {": the model is being loaded", ""}
        error = json.loads(event.partition(b"\n\n")[0])["error"]
        assert (error["message"], error["type"], error["code"]) == ("bad prompt", "BadRequestError", "400")
        assert reply.body.endswith(b"data: [DONE]\n\n")


def test_a_model_that_cannot_start_says_why_and_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {"extra_args": ["--fail", "no such shard"]}}) as front:
        reply = ask(front, "a")
        assert (reply.status, reply.header("retry-after")) == (503, "1")
        message = reply.json()["error"]["message"]
        assert "no such shard" in message
        assert "\n" not in message
        assert str(tmp_path) not in message
        again = ask(front, "a")
        assert again.status == 503
        assert front.relay.owner.find("a").failed in (1, 2)


@pytest.mark.slow
def test_a_deadline_ends_the_wait_with_503(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = {"extra_args": ["--load", "60"]}
    limits = {"load_timeout_s": 0.3, "heartbeat_s": 0.05}
    with owning(monkeypatch, tmp_path, {"a": engine}, limits=limits) as front:
        plain = ask(front, "a")
        assert plain.status == 503
        assert plain.header("retry-after") is not None
        assert plain.json()["error"]["message"].startswith("The model was not loaded in time: it is loading.")
        stream = ask(front, "a", stream=True)
        assert stream.status == 200
        assert b'"code": "model_not_loaded"' in stream.body


def test_a_client_that_leaves_is_out_of_the_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {"extra_args": ["--load", "60"]}}) as front:
        model = front.relay.owner.find("a")
        body = json.dumps({"model": "a"}).encode()
        for _ in range(3):
            with front.connect() as connection:
                connection.sendall(
                    b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)
                )
                wait_until(lambda: len(model.waiting) == 1)
            wait_until(lambda: not model.waiting)
        front.wait_idle()
        assert front.relay.backlog.total == 0


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_for_the_next_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with owning(monkeypatch, tmp_path, {"a": {}}) as front:
        first = ask(front, "a")
        assert ask(front, "a", prompt="die").status == 502
        model = front.relay.owner.find("a")
        wait_until(lambda: model.failed == 1, 20)
        assert "exit" in model.cause
        wait_until(lambda: model.state == "unloaded", 20)
        assert ask(front, "a").json() != first.json()


@pytest.mark.slow
def test_idle_engines_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {"idle_timeout_s": 0.2}}) as front:
        assert ask(front, "a").status == 200
        wait_until(lambda: front.relay.owner.find("a").state == "unloaded", 20)
        assert not list_engines()
        assert ask(front, "a").status == 200


def test_reading_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {}}) as front:
        assert front.ask("/v1/models").json()["data"][0]["id"] == "a"
        assert front.ask("/version").status == 503
        assert front.ask("/ready").status == 200
        metrics = front.ask("/metrics").body.decode()
        assert 'laguna_gateway_model_state{model="a",state="unloaded"} 1.0' in metrics
        assert not list_engines()


def test_a_request_without_a_key_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = {"name": "k", "sha256": "a" * 64}
    with owning(monkeypatch, tmp_path, {"a": {}}, keys=[key]) as front:
        assert front.ask(PATH, b'{"model": "a"}', method="OPTIONS").status == 503
        assert front.ask(PATH, b'{"model": "a"}').status == 401
        assert front.relay.owner.find("a").state == "unloaded"
        assert not list_engines()


def test_what_no_model_answers_loads_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = b'{"model": "a"}'
    with owning(monkeypatch, tmp_path, {"a": {}, "b": {}}, server={"extra_paths": ["/mine"]}) as front:
        for path in ("/v1/nope", "/v2/nope", "/inference/v1/nope"):
            reply = front.ask(path, body)
            assert (reply.status, reply.json()["error"]["code"]) == (404, "unknown_url")
        for method, path in (("PUT", PATH), ("GET", PATH), ("GET", "/mine"), ("POST", "/v1/models")):
            assert front.ask(path, body, method=method).json()["error"]["code"] == "service_unavailable"
        assert front.ask("/v1/responses/r/cancel", body).status == 503
        assert {model.state for model in front.relay.owner.scheduler.models.values()} == {"unloaded"}
        assert not list_engines()


@pytest.mark.vllm
def test_every_route_of_vllm_is_known() -> None:
    """When this fails, vLLM has another one: name it in serving/gateway/wire/paths.py."""
    folder = Path(str(find_spec("vllm").origin)).parent / "entrypoints"  # type: ignore[union-attr]
    route = re.compile(r'@\w*router\.(?:get|post|api_route|websocket)\(\s*"(/[^"{]*)')
    found = {path for file in folder.rglob("*.py") for path in route.findall(file.read_text())}
    public = {path for path in found if path.startswith(PUBLIC_PREFIXES) or path in PUBLIC_PATHS} - NOT_PUBLIC
    assert len(public) > 30
    assert (public | NEWER) - {STORED} == ANSWERED | TOLD


@pytest.mark.slow
def test_a_pinned_model_is_there_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {"pinned": True}}) as front:
        wait_until(lambda: front.relay.owner.find("a").state == "ready", 20)


@pytest.mark.slow
def test_admin_port_lists_loads_pins_and_unloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {}, "b": {}}) as front:
        listed = front.ask_admin("/admin/models").json()
        assert {name: model["state"] for name, model in listed["models"].items()} == {"a": "unloaded", "b": "unloaded"}
        assert listed["groups"]["default"]["held_bytes"] == 0
        assert front.ask_admin("/admin/models/load?model=c", {}).status == 404
        assert front.ask_admin("/admin/update_weights?model=a", {"update": [{}]}).status == 409
        assert front.ask_admin("/admin/models/load?model=a", {}).json()["state"] == "loading"
        wait_until(lambda: front.relay.owner.find("a").state == "ready", 60)
        assert front.ask_admin("/admin/models/pin?model=a", {}).json()["pinned"] is True
        refused = ask(front, "b")
        assert refused.status == 503
        assert "pinned models leave" in refused.json()["error"]["message"]
        assert "pinned" in front.ask_admin("/").body.decode()
        assert front.ask_admin("/admin/status").json()["models"]["a"]["engine"]["measured"] is True
        assert front.ask_admin("/admin/models/pin?model=a&pinned=false", {}).json()["pinned"] is False
        assert ask(front, "b").status == 200
        front.wait_idle()
        front.ask_admin("/admin/models/unload?model=b", {})
        wait_until(lambda: not list_engines(), 60)


@pytest.mark.slow
def test_a_model_that_a_reload_gives_to_others_engines_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Upstream() as outside, owning(monkeypatch, tmp_path, {"a": {}}) as front:
        assert ask(front, "a").status == 200
        models = [{"name": "a", "upstreams": [{"name": "outside", "url": outside.url}]}]
        config = parse_config({"models": models, "server": {"port": 0}}, "test")
        front.server.call(lambda relay: relay.configure(config))
        wait_until(lambda: not list_engines())
        assert ask(front, "a").header("x-upstream") == "outside"


def test_a_reload_changes_engines_when_they_are_idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with owning(monkeypatch, tmp_path, {"a": {}}) as front:
        first = ask(front, "a").json()
        front.wait_idle()
        config = front.relay.config
        front.server.call(lambda relay: relay.configure(config))
        assert ask(front, "a").json() == first
        (model,) = config.models
        engine = model.engine.model_copy(update={"seed": 7})
        changed = config.model_copy(update={"models": (model.model_copy(update={"engine": engine}),)})
        front.server.call(lambda relay: relay.configure(changed))
        again = ask(front, "a")
        assert again.status == 200
        assert again.json() != first
