"""Requests that their model cannot serve go to another one, by its rule, before a byte of an answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
from gateway_fakes import NOBODY, SSE, Exchange, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.config import ConfigError, parse_config

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "temperature": 0.1}'


def make_model(name: str, url: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "upstreams": [{"name": f"{name}-a", "url": url, "max_in_flight": 1}], **more}


def make_key(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}


def count(front: Any, headers: str = "") -> list[str]:
    text = front.ask("/metrics", headers=headers).body.decode()
    return [line for line in text.splitlines() if line.startswith("laguna_gateway_fallbacks_total")]


def test_model_that_is_down_is_answered_for_by_another() -> None:
    with Upstream() as engine:
        models = [make_model("m", NOBODY, fallback=["gone", "other"]), make_model("other", engine.url)]
        models.append(make_model("gone", NOBODY))
        with gateway(models=models) as front:
            reply = front.ask(CHAT, BODY)
            assert reply.status == 200
            assert json.loads(reply.json()["body"]) == {"model": "other", "temperature": 0.1}
            assert (reply.header("x-fallback-from"), reply.header("x-upstream")) == ("m", "other-a")
            own = front.ask(CHAT, b'{"model": "other"}')
            assert own.header("x-fallback-from") is None
            front.wait_idle()
            assert count(front) == [
                'laguna_gateway_fallbacks_total{model="m",other="gone",reason="no_engine"} 1.0',
                'laguna_gateway_fallbacks_total{model="m",other="other",reason="no_engine"} 1.0',
            ]


def test_rules_make_no_circles_and_the_last_failure_is_told() -> None:
    models = [make_model("m", NOBODY, fallback=["other"]), make_model("other", NOBODY, fallback=["m"])]
    with gateway(models=models) as front:
        reply = front.ask(CHAT, BODY)
        assert (reply.status, reply.header("x-fallback-from")) == (503, "m")
        front.wait_idle()
        assert len(count(front)) == 1


def test_full_queue_sends_what_comes_then_elsewhere() -> None:
    release = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await release.wait()
        await exchange.answer(b"{}")

    with Upstream({CHAT: hold}) as engine, Upstream() as second:
        models = [make_model("m", engine.url, fallback=["other"]), make_model("other", second.url)]
        with gateway(models=models, limits={"max_queued": 0}) as front:
            with front.connect() as connection:
                connection.sendall(make_request(CHAT, BODY))
                wait_until(lambda: len(engine.seen) == 1)
                assert front.ask(CHAT, BODY).header("x-fallback-from") == "m"
                engine._loop.call_soon_threadsafe(release.set)
                assert read_reply(connection).header("x-fallback-from") is None
            front.wait_idle()


@pytest.mark.parametrize(("causes", "status"), [(["lost"], 200), (["down", "queue_full"], 502)])
def test_engine_that_dies_with_the_request_is_replaced_only_where_the_rule_says_so(
    causes: list[str], status: int
) -> None:
    async def die(exchange: Exchange) -> None:
        exchange.abort()

    with Upstream({CHAT: die}) as engine, Upstream() as second:
        models = [make_model("m", engine.url, fallback=["other"], fallback_on=causes), make_model("other", second.url)]
        with gateway(models=models, keys=[make_key("k", tokens_per_day=10_000)]) as front:
            reply = front.ask(CHAT, BODY, "x-api-key: k\r\n")
            assert (reply.status, len(second.seen)) == (status, int(status == 200))
            front.wait_idle()
            found = front.ask_admin("/admin/usage").json()["keys"]["k"]
            assert (found["reserved_tokens"], found["in_flight"]) == (0, 0)
            assert list(found["today"]) == ["other" if status == 200 else "m"], "one request is charged once"
            assert sum(tally["requests"] for tally in found["today"].values()) == 1


def test_stream_that_has_begun_goes_nowhere_else() -> None:
    async def cut(exchange: Exchange) -> None:
        await exchange.start(SSE)
        await exchange.chunk(b"data: 1\n\n")
        exchange.abort()

    causes = ["down", "lost", "silent", "queue_full", "queue_timeout", "load_failed"]
    with Upstream({CHAT: cut}) as engine, Upstream() as second:
        models = [make_model("m", engine.url, fallback=["other"], fallback_on=causes), make_model("other", second.url)]
        with gateway(models=models) as front:
            reply = front.ask(CHAT, BODY)
            assert reply.status == 200
            assert b"error" in reply.body
            assert second.seen == []
            front.wait_idle()


def test_queue_that_takes_too_long_and_engine_that_is_silent() -> None:
    async def sleep(exchange: Exchange) -> None:
        await asyncio.sleep(30)

    causes = ["silent", "queue_timeout"]
    with Upstream({CHAT: sleep}) as engine, Upstream() as second:
        models = [make_model("m", engine.url, fallback=["other"], fallback_on=causes), make_model("other", second.url)]
        limits = {"queue_timeout_s": 0.1, "first_byte_timeout_s": 0.4}
        with gateway(models=models, limits=limits) as front, front.connect() as connection:
            connection.sendall(make_request(CHAT, BODY))
            wait_until(lambda: len(engine.seen) == 1)
            assert front.ask(CHAT, BODY).status == 200
            assert read_reply(connection).status == 200
            front.wait_idle()
            reasons = sorted(line.partition('reason="')[2].partition('"')[0] for line in count(front))
            assert reasons == ["engine_silent", "queue_timeout"]


def test_other_model_that_a_reload_has_taken_out_is_passed_over() -> None:
    async def sleep(exchange: Exchange) -> None:
        await asyncio.sleep(30)

    with Upstream({CHAT: sleep}) as engine, Upstream() as second:
        rule = {"fallback": ["other"], "fallback_on": ["silent"]}
        models = [make_model("m", engine.url, **rule), make_model("other", second.url)]
        with (
            gateway(models=models, limits={"first_byte_timeout_s": 0.4}) as front,
            front.connect() as connection,
        ):
            connection.sendall(make_request(CHAT, BODY))
            wait_until(lambda: len(engine.seen) == 1)
            tables = {"models": [make_model("m", engine.url)], "limits": {"first_byte_timeout_s": 0.4}}
            config = parse_config({**tables, "server": {"port": 0}}, "test")
            front.server.call(lambda relay: relay.configure(config))
            assert read_reply(connection).status == 504
            front.wait_idle()
            assert second.seen == []


def test_key_falls_back_on_its_own_models_alone() -> None:
    with Upstream() as one, Upstream() as two:
        models = [make_model("m", NOBODY, fallback=["a", "b"]), make_model("a", one.url), make_model("b", two.url)]
        keys = [make_key("some", models=["m", "b"]), make_key("one", models=["m"])]
        with gateway(models=models, keys=keys) as front:
            reply = front.ask(CHAT, BODY, "x-api-key: some\r\n")
            assert (reply.header("x-upstream"), one.seen) == ("b-a", [])
            assert front.ask(CHAT, BODY, "x-api-key: one\r\n").status == 503
            front.wait_idle()
            assert front.ask_admin("/admin/usage").json()["keys"]["some"]["today"]["b"]["requests"] == 1


def test_body_that_is_no_json_stays_with_its_model() -> None:
    form = b'--X\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--X--\r\n'
    with Upstream() as engine:
        models = [make_model("m", NOBODY, fallback=["other"]), make_model("other", engine.url)]
        with gateway(models=models) as front:
            kind = "content-type: multipart/form-data; boundary=X\r\n"
            assert front.ask("/v1/audio/transcriptions", form, kind).status == 503
            assert engine.seen == []


def test_provider_behind_a_prefix_with_a_key_and_another_health_path(tmp_path: Any) -> None:
    (tmp_path / "key").write_text("sk-provider\n")

    async def list_models(exchange: Exchange) -> None:
        assert b"authorization: Bearer sk-provider" in exchange.head
        await exchange.answer(b'{"data": []}')

    provider = Upstream({"/api/v1/models": list_models})
    provider.healthy = False
    with provider:
        upstream = {"name": "p", "url": f"{provider.url}/api", "health_path": "/v1/models"}
        upstream |= {"api_key_file": str(tmp_path / "key"), "max_in_flight": 8}
        models = [make_model("m", NOBODY, fallback=["provided"]), {"name": "provided", "upstreams": [upstream]}]
        with gateway(models=models, keys=[make_key("k")]) as front:
            reply = front.ask(CHAT, BODY, "x-api-key: k\r\n")
            assert (reply.status, reply.json()["line"]) == (200, f"POST /api{CHAT} HTTP/1.1")
            assert ["authorization", "Bearer sk-provider"] in reply.json()["headers"]
            assert "x-api-key" not in dict(reply.json()["headers"])


@pytest.mark.parametrize("fallback", [["m"], ["nobody"], ["other", "other"]])
def test_rule_that_names_no_other_model_is_refused(fallback: list[str]) -> None:
    models = [make_model("m", NOBODY, fallback=fallback), make_model("other", NOBODY)]
    with pytest.raises(ConfigError, match=r"expected (names of other models as fallback of 'm'|distinct names)"):
        parse_config({"models": models}, "test")
