"""How engines are reached: credential, path and certificate; and whom they learn a request is from."""

from __future__ import annotations

import asyncio
import json
import shutil
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateway_engine import RlEngine
from gateway_fakes import Upstream, gateway, read_headers, wait_until

from laguna_serve.serving.gateway.config import ConfigError, parse_config
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.wire.client_address import Proxies
from laguna_serve.serving.gateway.wire.failures import UnreachableError
from laguna_serve.serving.gateway.wire.headers import read_head

PATH = "/v1/completions"
BODY = b'{"model": "m", "temperature": 0}'
SECRET = "sk-engine-secret"

both_ways = pytest.mark.parametrize("asgi", [False, True], ids=["direct", "asgi"])


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "engine.key"
    path.write_text(f"{SECRET}\n")
    return str(path)


def make_tables(**upstream: object) -> dict[str, object]:
    return {"models": [{"name": "m", "upstreams": [{"name": "a", "url": "http://h:1", **upstream}]}]}


def list_authorizations(upstream: Upstream) -> set[tuple[str, ...]]:
    return {
        tuple(value for name, value in read_headers(exchange.head) if name in ("authorization", "x-api-key"))
        for exchange in [*upstream.seen, *upstream.checks]
    }


@both_ways
def test_credential_is_sent_with_everything_and_shown_nowhere(key_file: str, asgi: bool) -> None:
    with RlEngine() as engine, Upstream() as candidate:
        health = {"path": "/alive", "interval_s": 0.05}  # seen, unlike /health
        shadows = [{"name": "s", "url": candidate.url, "api_key_file": key_file}]
        upstream = {"api_key_file": key_file}
        with gateway(engine, upstream=upstream, model={"shadows": shadows}, health=health, asgi=asgi) as front:
            reply = front.ask(PATH, BODY, "authorization: Bearer the-clients\r\nx-api-key: the-clients\r\n")
            assert reply.status == 200
            assert front.ask_admin("/weight_info").status == 200
            status = front.ask_admin("/admin/status").body.decode() + front.ask_admin("/").body.decode()
            metrics = front.ask("/metrics").body.decode()
            wait_until(lambda: any("/alive" in exchange.line for exchange in engine.seen))
            wait_until(lambda: len(candidate.seen) == 1)
            assert list_authorizations(engine) == list_authorizations(candidate) == {(f"Bearer {SECRET}",)}
            assert {exchange.line.split(" ")[1] for exchange in [*engine.seen, *engine.checks]} >= {
                PATH,
                "/metrics",
                "/weight_info",
            }
            config = front.relay.config
            assert SECRET not in status + metrics + front.log.getvalue() + repr(config) + str(config.models)


def test_credential_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", SECRET)
    with Upstream() as engine, gateway(engine, upstream={"api_key_env": "ENGINE_KEY"}) as front:
        assert front.ask(PATH, BODY).status == 200
        assert list_authorizations(engine) == {(f"Bearer {SECRET}",)}


def test_credential_is_read_again_at_a_reload(tmp_path: Path, key_file: str) -> None:
    with Upstream() as engine, gateway(engine, upstream={"api_key_file": key_file}) as front:
        assert front.ask(PATH, BODY).status == 200
        Path(key_file).write_text("sk-renewed")
        upstreams = [{"name": "a", "url": engine.url, "api_key_file": key_file}]
        config = parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")
        front.loop.call_soon_threadsafe(front.relay.configure, config)
        wait_until(lambda: front.relay.config is config)
        assert front.ask(PATH, BODY).status == 200
        assert list_authorizations(engine) == {(f"Bearer {SECRET}",), ("Bearer sk-renewed",)}


@pytest.mark.parametrize(
    ("text", "told"),
    [("two words", "several words"), ("", "nothing"), ("é", "other characters"), (None, "No such file")],
)
def test_credential_that_is_none_is_refused_without_its_text(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(make_tables(api_key_file=str(path)), "test")
    assert "api_key_file: expected" in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["api_key_file", "api_key_env", "api_key"])
def test_key_in_the_place_of_a_files_name_is_not_shown(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(make_tables(**{name: SECRET}), "test")
    assert SECRET not in str(caught.value)
    assert "api_key" in str(caught.value)


def test_key_from_two_places_is_refused(key_file: str) -> None:
    with pytest.raises(ConfigError, match="expected api_key_file or api_key_env, got both"):
        parse_config(make_tables(api_key_file=key_file, api_key_env="X"), "test")


@both_ways
def test_engine_under_a_path(asgi: bool) -> None:
    with Upstream() as engine:
        upstream = {"url": f"{engine.url}/engines/a/"}
        with gateway(engine, upstream=upstream, health={"interval_s": 0.05}, asgi=asgi) as front:
            seen = front.ask(f"{PATH}?a=1", BODY).json()
            assert seen["line"] == f"POST /engines/a{PATH}?a=1 HTTP/1.1"
            assert dict(seen["headers"])["host"] == engine.url.removeprefix("http://")
            front.ask("/metrics")
            wait_until(
                lambda: {"/engines/a/health", "/engines/a/metrics"} <= {e.line.split(" ")[1] for e in engine.seen}
            )
            assert front.ask("/v1/../x").status == 400


@pytest.mark.parametrize(
    "url", ["http://h:1/a b", "http://h:1/../x", "http://h:1/a/./b", "http://h:1//a", "http://h:1/%2e"]
)
def test_path_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"url: expected http://host:port\[/prefix\]"):
        parse_config(make_tables(url=url), "test")


@pytest.mark.parametrize(
    "url", ["http://h:99999", "http://h:0", "http://h:-1", "http://h:x", "http://[::1", "h:1", "http://"]
)
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.0\.upstreams\.0\.url: expected http://host:port"):
        parse_config(make_tables(url=url), "test")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class _Secure(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    context: ssl.SSLContext

    def get_request(self) -> tuple[ssl.SSLSocket, object]:  # type: ignore[override]
        connection, address = super().get_request()
        return self.context.wrap_socket(connection, server_side=True), address

    def handle_error(self, *_: object) -> None:
        """A client that does not trust us."""


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline():
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length") else length
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}")


@contextmanager
def secure_engine(certificate: tuple[str, str]) -> Iterator[Upstream]:
    with _Secure(("127.0.0.1", 0), _Answer) as server:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.context.load_cert_chain(*certificate)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield Upstream(url=f"https://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


@pytest.mark.slow
def test_certificate_of_an_engine_is_checked(certificate: tuple[str, str]) -> None:
    with secure_engine(certificate) as engine:
        with gateway(engine, upstream={"tls_ca_file": certificate[0]}) as front:
            assert front.ask(PATH, BODY).status == 200
        with gateway(engine, upstream={"tls_verify": False}) as front:
            assert front.ask(PATH, BODY).status == 200
        with gateway(engine) as front:
            (found,) = front.relay.pools["m"].engines
            assert found.healthy is False
            assert (found.last_error or "").startswith("/health: certificate: self")
            assert front.ask(PATH, BODY).status == 503
        with pytest.raises(UnreachableError, match="certificate: self"):
            asyncio.run(Origin(engine.url).connect(10.0))


@pytest.mark.parametrize("given", [{"tls_ca_file": "/nowhere.pem"}, {"tls_verify": False}])
def test_authorities_need_https(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected an https url"):
        parse_config(make_tables(**given), "test")


def test_authorities_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path, told in ((tmp_path / "ca.pem", "expected certificates in PEM"), (tmp_path / "none", "No such file")):
        with pytest.raises(ConfigError, match=told):
            parse_config(make_tables(url="https://h:1", tls_ca_file=str(path)), "test")


CHAIN = "203.0.113.7, 10.0.0.5"


@pytest.mark.parametrize(
    ("trusted", "peer", "headers", "client", "forwarded"),
    [
        ([], "10.0.0.9", {"x-forwarded-for": CHAIN}, "10.0.0.9", "10.0.0.9"),
        (["10.0.0.0/8"], "198.51.100.1", {"x-forwarded-for": CHAIN}, "198.51.100.1", "198.51.100.1"),
        (["10.0.0.0/8"], "10.0.0.9", {"x-forwarded-for": CHAIN}, "203.0.113.7", f"{CHAIN}, 10.0.0.9"),
        # What the client itself put before is not believed.
        (["10.0.0.0/8"], "10.0.0.9", {"x-forwarded-for": f"1.1.1.1, {CHAIN}"}, "203.0.113.7", f"{CHAIN}, 10.0.0.9"),
        (["10.0.0.0/8"], "10.0.0.9", {"x-forwarded-for": "junk, 10.0.0.5"}, "10.0.0.5", "10.0.0.5, 10.0.0.9"),
        (["10.0.0.0/8"], "10.0.0.9", {"x-forwarded-for": "junk"}, "10.0.0.9", "10.0.0.9"),
        (["10.0.0.0/8"], "10.0.0.9", {}, "10.0.0.9", "10.0.0.9"),
        (
            ["10.0.0.0/8"],
            "10.0.0.9",
            {"forwarded": 'for="[2001:db8::1]:123";proto=https, for=10.0.0.5'},
            "2001:db8::1",
            None,
        ),
        (["10.0.0.0/8"], "10.0.0.9", {"forwarded": "proto=https;For=203.0.113.7:99"}, "203.0.113.7", None),
        (["::1"], "::1", {"x-forwarded-for": "203.0.113.7:1234"}, "203.0.113.7", "203.0.113.7, ::1"),
        (["127.0.0.1"], "::ffff:127.0.0.1", {"x-forwarded-for": "203.0.113.7"}, "203.0.113.7", None),
        (["10.0.0.0/8"], "", {"x-forwarded-for": CHAIN}, "", ""),
    ],
)
def test_whom_a_request_is_from(
    trusted: list[str], peer: str, headers: dict[str, str], client: str, forwarded: str | None
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    found = Proxies(trusted).find_client(read_head("GET", "/v1/x", b"/v1/x", b"", raw, peer))
    assert found[0] == client
    assert forwarded is None or found[1].decode() == forwarded


@both_ways
def test_client_is_in_the_log_and_told_to_the_engine(asgi: bool) -> None:
    spoofed = "x-forwarded-for: 203.0.113.7\r\nforwarded: for=203.0.113.7\r\n"
    with Upstream() as engine, gateway(engine, asgi=asgi) as front:
        headers = front.ask(PATH, BODY, spoofed).json()["headers"]
        assert [v for k, v in headers if k in ("x-forwarded-for", "forwarded")] == ["127.0.0.1"]
        front.wait_idle()
        wait_until(lambda: bool(front.log.getvalue()))
        assert json.loads(front.log.getvalue())["client"] == "127.0.0.1"
    with Upstream() as engine, gateway(engine, server={"trusted_proxies": ["127.0.0.0/8"]}, asgi=asgi) as front:
        headers = front.ask(PATH, BODY, spoofed).json()["headers"]
        assert [v for k, v in headers if k in ("x-forwarded-for", "forwarded")] == ["203.0.113.7, 127.0.0.1"]
        front.wait_idle()
        wait_until(lambda: bool(front.log.getvalue()))
        assert json.loads(front.log.getvalue())["client"] == "203.0.113.7"
