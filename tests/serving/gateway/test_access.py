"""Who may ask, how often and over what: rate limits per key, HTTPS, and engines that requests overflow to."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from gateway_fakes import Upstream, gateway, make_request, read_reply

from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.wire.errors import GatewayError

PATH = "/v1/completions"


def make_key(name: str, **limits: int) -> dict[str, object]:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}


def enter_and_leave(keyring: Keyring, headers: dict[bytes, bytes]) -> None:
    holder = keyring.find(headers)
    assert holder is not None
    holder.leave(holder.enter(), None)


def test_key_that_asks_too_often_is_told_when_to_come_back() -> None:
    now = [0.0]
    keyring = Keyring(Ledger(), lambda: now[0])
    models = [{"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}]
    keys = parse_config({"models": models, "keys": [make_key("k", requests_per_minute=3)]}, "test").keys
    keyring.configure(keys)
    headers = {b"x-api-key": b"k"}
    for _ in range(3):
        enter_and_leave(keyring, headers)
    with pytest.raises(GatewayError) as caught:
        enter_and_leave(keyring, headers)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 20)
    keyring.configure(keys)  # the file read again gives nothing back
    now[0] = 19.0
    with pytest.raises(GatewayError) as caught:
        enter_and_leave(keyring, headers)
    assert caught.value.retry_after_s == 1
    now[0] = 20.0
    enter_and_leave(keyring, headers)
    now[0] = 3600.0
    for _ in range(3):
        enter_and_leave(keyring, headers)
    with pytest.raises(GatewayError):
        enter_and_leave(keyring, headers)


def test_limit_is_a_keys_own() -> None:
    keys = [make_key("one", requests_per_minute=2), make_key("two")]
    with Upstream() as engine, gateway(engine, keys=keys) as front:
        found = [front.ask("/v1/models", headers="x-api-key: one\r\n") for _ in range(3)]
        assert [reply.status for reply in found] == [200, 200, 429]
        assert int(found[2].header("retry-after") or 0) > 0
        assert front.ask("/v1/models", headers="x-api-key: two\r\n").status == 200
        assert front.ask("/metrics").status == 401
        assert front.ask("/ready").status == 200, "probes have no key"
        assert front.ask("/metrics", headers="x-api-key: two\r\n").status == 200


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
def test_https(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    server = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    with Upstream() as engine, gateway(engine, server=server) as front:
        with context.wrap_socket(front.connect(), server_hostname="127.0.0.1") as connection:
            connection.sendall(make_request(PATH, b'{"model": "m"}'))
            reply = read_reply(connection)
        assert (reply.status, reply.json()["body"]) == (200, '{"model": "m"}')
        front.wait_idle()


def choose(loads: dict[str, int], schedule: list[list[int]]) -> str:
    """Which of a speculative and a plain engine gets the next request."""
    upstreams = [
        {"name": "fast", "url": "http://h:1", "gamma_schedule": schedule},
        {"name": "plain", "url": "http://h:2"},
    ]
    config = parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")
    pool = Pool(config.models[0], config.limits)
    pool.configure(config.models[0], config.limits)
    for engine in pool.engines:
        engine.in_flight = loads[engine.name]

    async def run() -> str:
        return (await pool.acquire(None)).name

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("fast", "plain", "chosen"),
    [(0, 0, "fast"), (3, 0, "fast"), (4, 0, "plain"), (4, 63, "plain"), (4, 64, "fast"), (63, 64, "fast")],
)
def test_requests_overflow_to_the_plain_engine_where_speculation_loses(fast: int, plain: int, chosen: str) -> None:
    assert choose({"fast": fast, "plain": plain}, [[1, 2, 7], [3, 4, 3], [5, 64, 0]]) == chosen


def test_schedule_of_a_sweep_is_read(tmp_path: Path) -> None:
    sweep = Path(__file__).parents[3] / "bench" / "results" / "toy-gamma-sweep" / "sweep.json"
    upstream = {"name": "a", "url": "http://h:1", "gamma_schedule": str(sweep)}
    (model,) = parse_config({"models": [{"name": "m", "upstreams": [upstream]}]}, "test").models
    assert model.upstreams[0].gamma_schedule[0][0] == 1
    assert model.upstreams[0].pays(1)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gamma_schedule: expected a schedule or a sweep\.json"):
        parse_config(
            {"models": [{"name": "m", "upstreams": [{**upstream, "gamma_schedule": str(tmp_path / "none.json")}]}]}, "t"
        )


def test_schedule_that_makes_no_sense_is_refused() -> None:
    upstream = {"name": "a", "url": "http://h:1", "gamma_schedule": [[1, 4, 7], [3, 8, 0]]}
    with pytest.raises(ValueError, match="expected ascending ranges"):
        parse_config({"models": [{"name": "m", "upstreams": [upstream]}]}, "test")


def test_admin_beyond_this_machine_needs_a_key() -> None:
    models = [{"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}]
    with pytest.raises(ValueError, match="expected a sha256 for a host other than"):
        parse_config({"models": models, "admin": {"host": "0.0.0.0"}}, "test")
    parse_config({"models": models, "admin": {"host": "0.0.0.0", "sha256": "0" * 64}}, "test")
