"""Web pages in browsers: preflights without a key, whose answers may be read, on both ways through the gateway."""

from __future__ import annotations

import hashlib

import pytest
from gateway_fakes import Exchange, Reply, Upstream, gateway

PATH = "/v1/chat/completions"
BODY = b'{"model": "m"}'
PAGE, OTHER = "https://chat.example.org", "https://evil.example.org"
KEYS = [{"name": "k", "sha256": hashlib.sha256(b"sk").hexdigest()}]
PREFLIGHT = "access-control-request-method: POST\r\naccess-control-request-headers: authorization,content-type\r\n"

both_ways = pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])


async def allow_all(exchange: Exchange) -> None:
    """As vLLM, whose default is to allow every origin."""
    headers = "content-type: application/json\r\naccess-control-allow-origin: *\r\naccess-control-allow-headers: a\r\n"
    await exchange.answer(b"{}", headers + "vary: Accept\r\n")


def list_values(reply: Reply, name: str) -> list[str]:
    return [value for found, value in reply.headers if found == name]


def list_cors(reply: Reply) -> set[str]:
    return {name for name, _ in reply.headers if name.startswith("access-control-")}


@both_ways
def test_without_the_setting_preflights_pass_to_the_engine_without_a_key(asgi: bool) -> None:
    with Upstream({PATH: allow_all}) as engine, gateway(engine, keys=KEYS, asgi=asgi) as front:
        reply = front.ask(
            PATH, headers=f"origin: {PAGE}\r\n{PREFLIGHT}authorization: Bearer other\r\n", method="OPTIONS"
        )
        assert (reply.status, list_values(reply, "access-control-allow-origin")) == (200, ["*"])
        assert b"authorization: Bearer" not in engine.seen[0].head, "a key is never passed on"
        assert front.ask(PATH, BODY, f"origin: {PAGE}\r\n").status == 401
        assert front.ask("/pause", headers=f"origin: {PAGE}\r\n{PREFLIGHT}", method="OPTIONS").status == 404
        assert front.ask(PATH, b"x" * 70_000, method="OPTIONS").status == 413
        assert len(engine.seen) == 1


@both_ways
def test_listed_origin(asgi: bool) -> None:
    server = {"allowed_origins": [PAGE, "http://localhost:3000"]}
    with Upstream({PATH: allow_all}) as engine, gateway(engine, keys=KEYS, server=server, asgi=asgi) as front:
        reply = front.ask(PATH, headers=f"origin: {PAGE}\r\n{PREFLIGHT}", method="OPTIONS")
        assert (reply.status, reply.body) == (204, b"")
        assert list_values(reply, "access-control-allow-origin") == [PAGE]
        assert list_values(reply, "access-control-allow-credentials") == ["true"]
        assert list_values(reply, "access-control-allow-headers") == ["authorization,content-type"]
        assert "POST" in (reply.header("access-control-allow-methods") or "")
        assert "Origin" in (reply.header("vary") or "")
        assert engine.seen == []
        refused = front.ask(PATH, headers=f"origin: {OTHER}\r\n{PREFLIGHT}", method="OPTIONS")
        assert (refused.status, list_cors(refused)) == (403, set())

        key = "authorization: Bearer sk\r\n"
        reply = front.ask(PATH, BODY, f"origin: {PAGE}\r\n{key}")
        assert reply.status == 200
        assert list_values(reply, "access-control-allow-origin") == [PAGE]
        assert "x-request-id" in (reply.header("access-control-expose-headers") or "")
        assert list_values(reply, "vary") == ["Accept", "Origin"]
        assert list_values(reply, "access-control-allow-headers") == []
        for headers in (f"origin: {OTHER}\r\n{key}", key):
            reply = front.ask(PATH, BODY, headers)
            assert (reply.status, list_cors(reply), list_values(reply, "vary")) == (200, set(), ["Accept", "Origin"])


@both_ways
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [(PATH, BODY, 401), ("/nope", None, 401), ("/ready", None, 200), ("/metrics", None, 401), ("/health", None, 200)],
)
def test_own_answers_can_be_read_by_the_page(asgi: bool, path: str, body: bytes | None, status: int) -> None:
    server = {"allowed_origins": [PAGE]}
    with Upstream() as engine, gateway(engine, keys=KEYS, server=server, asgi=asgi) as front:
        reply = front.ask(path, body, f"origin: {PAGE}\r\n")
        assert (reply.status, list_values(reply, "access-control-allow-origin")) == (status, [PAGE])
        assert list_values(reply, "vary") == ["Origin"]
        preflight = front.ask(path, headers=f"origin: {PAGE}\r\n{PREFLIGHT}", method="OPTIONS")
        assert preflight.status == (404 if path == "/nope" else 204)


@both_ways
def test_any_origin_never_goes_with_credentials(asgi: bool) -> None:
    with Upstream({PATH: allow_all}) as engine, gateway(engine, server={"allowed_origins": ["*"]}, asgi=asgi) as front:
        preflight = front.ask(PATH, headers=f"origin: {OTHER}\r\n{PREFLIGHT}", method="OPTIONS")
        for reply in (preflight, front.ask(PATH, BODY, f"origin: {OTHER}\r\n"), front.ask("/health")):
            assert list_values(reply, "access-control-allow-origin") == ["*"]
            assert "access-control-allow-credentials" not in list_cors(reply)
        assert front.ask(PATH, BODY).header("vary") == "Accept"
        assert front.ask("/v1/x", b'{"model": "none"}').header("access-control-allow-origin") == "*"


def test_options_that_are_no_preflight_pass_to_the_engine() -> None:
    with Upstream() as engine, gateway(engine, server={"allowed_origins": [PAGE]}) as front:
        assert front.ask(PATH, headers=f"origin: {PAGE}\r\n", method="OPTIONS").json()["line"].startswith("OPTIONS ")
        assert len(engine.seen) == 1
