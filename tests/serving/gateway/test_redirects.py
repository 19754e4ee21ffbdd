"""Nothing that an engine answers leads clients past the gateway, or tells of the connection to it."""

from __future__ import annotations

import hashlib

import pytest
from gateway_fakes import Exchange, Upstream, gateway, read_headers

from laguna_serve.serving.gateway.wire.headers import pass_headers
from laguna_serve.serving.gateway.wire.redirects import Site, localize, localize_url

ENGINE = Site(b"10.0.0.1:8000", "10.0.0.1", 8000)
PREFIXED = Site(b"Engine", "engine", 80, b"/e1")
V6 = Site(b"[::1]:8000", "::1", 8000)


@pytest.mark.parametrize(
    ("site", "url", "expected"),
    [
        (ENGINE, "http://10.0.0.1:8000/v1/x?a=1&b=%2F#c", "/v1/x?a=1&b=%2F#c"),
        (ENGINE, "HTTP://10.0.0.1:8000/v1/x", "/v1/x"),
        (ENGINE, "https://10.0.0.1:8000/v1/x", "/v1/x"),
        (ENGINE, "//10.0.0.1:8000/v1/x", "/v1/x"),
        (ENGINE, "http://user:word@10.0.0.1:8000/v1/x", "/v1/x"),
        (ENGINE, "http://10.0.0.1:8000", "/"),
        (ENGINE, "http://10.0.0.1:8000?a", "/?a"),
        (ENGINE, "http://10.0.0.1:8000//elsewhere/x", "/elsewhere/x"),
        (ENGINE, "http://10.0.0.1:8000/\\elsewhere/x", "/elsewhere/x"),
        (ENGINE, "http://10.0.0.1/v1/x", "http://10.0.0.1/v1/x"),
        (ENGINE, "http://10.0.0.1:80001/v1/x", "http://10.0.0.1:80001/v1/x"),
        (ENGINE, "http://10.0.0.1.evil:8000/v1/x", "http://10.0.0.1.evil:8000/v1/x"),
        (ENGINE, "https://elsewhere/v1/x", "https://elsewhere/v1/x"),
        (ENGINE, "//elsewhere/v1/x", "//elsewhere/v1/x"),
        (ENGINE, "/v1/x", "/v1/x"),
        (ENGINE, "x?y", "x?y"),
        (ENGINE, "?y", "?y"),
        (ENGINE, "", ""),
        (ENGINE, "http://[broken", "http://[broken"),
        (ENGINE, "mailto:a@10.0.0.1:8000", "mailto:a@10.0.0.1:8000"),
        (PREFIXED, "http://ENGINE/e1/v1/x", "/v1/x"),
        (PREFIXED, "http://engine:80/e1/v1/x", "/v1/x"),
        (PREFIXED, "http://engine/e1", "/"),
        (PREFIXED, "/e1/v1/x", "/v1/x"),
        (PREFIXED, "/e12/v1/x", "/e12/v1/x"),
        (PREFIXED, "/e1//elsewhere", "/elsewhere"),
        (V6, "http://[::1]:8000/v1/x", "/v1/x"),
    ],
)
def test_url_of_the_engine_is_a_path_on_the_gateway(site: Site, url: str, expected: str) -> None:
    assert localize_url(url.encode(), site).decode() == expected


def test_links_are_read_one_by_one() -> None:
    value = b'<http://10.0.0.1:8000/v1/x?page=2>; rel="next", <https://docs/x>; rel=help'
    assert localize(b"link", value, ENGINE) == b'</v1/x?page=2>; rel="next", <https://docs/x>; rel=help'


def test_headers_of_one_hop_stay_behind() -> None:
    headers = [
        (b"connection", b"X-Hop, keep-alive"),
        (b"connection", b"x-other"),
        (b"x-hop", b"1"),
        (b"x-other", b"2"),
        (b"keep-alive", b"timeout=5"),
        (b"upgrade", b"h2c"),
        (b"x-end", b"3"),
        (b"content-location", b"http://10.0.0.1:8000/v1/x"),
    ]
    assert pass_headers(headers, ENGINE) == [(b"x-end", b"3"), (b"content-location", b"/v1/x")]


async def redirect(exchange: Exchange) -> None:
    """As Starlette redirects to the path without its slash at the end."""
    host = dict(read_headers(exchange.head))["host"]
    path = exchange.line.split(" ")[1].rstrip("/")
    await exchange.answer(b"", f"location: http://{host}{path}\r\n", "307 Temporary Redirect")


@pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])
def test_redirect_is_followed_to_the_gateway_and_its_keys(asgi: bool) -> None:
    keys = [{"name": "k", "sha256": hashlib.sha256(b"k").hexdigest()}]
    with Upstream({"/v1/chat/completions/": redirect}) as engine, gateway(engine, keys=keys, asgi=asgi) as front:
        reply = front.ask("/v1/chat/completions/", b"{}", "x-api-key: k\r\n")
        where = reply.header("location")
        assert (reply.status, where) == (307, "/v1/chat/completions")
        assert front.ask(where or "", b"{}").status == 401
        assert front.ask(where or "", b"{}", "x-api-key: k\r\n").json()["line"] == "POST /v1/chat/completions HTTP/1.1"
