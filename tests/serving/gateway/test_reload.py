"""SIGHUP: a configuration is taken whole or not at all, and what needs a restart is named."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from gateway_engine import RlEngine
from gateway_fakes import Exchange, Upstream, gateway, make_request, read_reply, wait_until
from test_config import process

from laguna_serve.serving.cli import main
from laguna_serve.serving.gateway.config import Config, load_config, parse_config
from laguna_serve.serving.gateway.config.tables import Limits, Model
from laguna_serve.serving.gateway.config.tables import Upstream as Upstreamed
from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.reach import reach
from laguna_serve.serving.gateway.wire.failures import UnreachableError

PATH = "/v1/completions"
TEXT = """
[server]
port = 0
max_body_bytes = 100000

[[models]]
name = "m"

[[models.upstreams]]
name = "one"
url = "{url}"
"""
SMALLER = ("max_body_bytes = 100000", "max_body_bytes = 2000")
FAULTS = {
    "port": ('url = "{url}"', 'url = "http://127.0.0.1:99999"'),
    "credential": ('url = "{url}"', 'url = "{url}"\napi_key_file = "/nowhere/key"'),
    "variable": ('url = "{url}"', 'url = "{url}"\napi_key_env = "LAGUNA_TEST_NOT_SET"'),
    "schedule": ('url = "{url}"', 'url = "{url}"\ngamma_schedule = "/nowhere/sweep.json"'),
    "authorities": ('url = "{url}"', 'url = "https://h:1"\ntls_ca_file = "/nowhere/ca.pem"'),
    "certificate": ("port = 0", 'port = 0\nssl_certfile = "/nowhere/cert.pem"'),
    "digest": ("[[models]]", '[[keys]]\nname = "k"\nsha256 = "sk-secret"\n\n[[models]]'),
    "network": ("port = 0", 'port = 0\ntrusted_proxies = ["10.0.0.1/8"]'),
    "syntax": ("[[models]]", "[[models"),
    "nothing": (TEXT, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_by_check_and_at_the_start(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(TEXT.replace(*FAULTS[fault]).replace("{url}", "http://127.0.0.1:9"))
    told = []
    for more in (["--check"], []):
        assert main(["gateway", "--config", str(path), *more]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 1
    assert "sk-secret" not in told[0]


@pytest.mark.slow
def test_reload_with_a_fault_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    with Upstream() as engine:
        path.write_text(TEXT.replace("{url}", engine.url))
        body = b'{"model": "m", "prompt": "' + b"x" * 5000 + b'"}'

        def ask(url: str) -> int:
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
                connection.sendall(make_request(PATH, body))
                return read_reply(connection).status

        with process("--config", str(path)) as (server, url):
            assert server.stderr is not None
            for old, new in FAULTS.values():
                path.write_text(TEXT.replace(*SMALLER).replace(old.replace(*SMALLER), new).replace("{url}", engine.url))
                server.send_signal(signal.SIGHUP)
                line = server.stderr.readline()
                assert " ERROR gateway: " in line
                assert line.endswith("; going on as before\n")
                assert "sk-secret" not in line
                assert ask(url) == 200
            path.write_text(TEXT.replace(*SMALLER).replace("{url}", engine.url))
            server.send_signal(signal.SIGHUP)
            assert server.stderr.readline().endswith(" INFO gateway: configuration read again\n")
            assert ask(url) == 413


def test_fault_that_no_check_finds_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails while the new state is made: nothing of the old one has been replaced."""

    def fail(self: Pool, model: object) -> list[object]:
        raise RuntimeError("planted")

    with Upstream() as engine, gateway(engine, keys=[]) as front:
        relay = front.relay
        upstreams = [{"name": "b", "url": engine.url}]
        tables = {"models": [{"name": "new", "upstreams": upstreams}], "limits": {"max_queued": 1}}
        before = (
            relay.config,
            dict(relay.pools),
            relay.max_connections,
            relay.cors,
            relay.pools["m"].engines[0].config,
        )
        monkeypatch.setattr(Pool, "plan", fail)
        front.server._reload = lambda: parse_config({**tables, "server": {"allowed_origins": ["*"]}}, "test")
        front.loop.call_soon_threadsafe(front.server.reload)
        wait_until(lambda: "reload_successful 0.0" in front.ask("/metrics").body.decode())
        after = (relay.config, dict(relay.pools), relay.max_connections, relay.cors, relay.pools["m"].engines[0].config)
        assert after == before
        assert front.ask(PATH, b'{"model": "m"}').status == 200


def reload(front: object, config: Callable[[], Config]) -> None:
    front.server._reload = config  # type: ignore[attr-defined]
    front.loop.call_soon_threadsafe(front.server.reload)  # type: ignore[attr-defined]


def test_request_is_sent_to_the_engine_that_a_reload_brings_while_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        first, second = (
            Model(name="m", upstreams=(Upstreamed(name=name, url=f"http://127.0.0.1:{port}"),))
            for name, port in (("a", 1), ("b", 2))
        )
        pool, limits = Pool(first, Limits()), Limits()
        pool.configure(first, limits)

        async def connect(self: Origin, timeout_s: float) -> str:
            if pool.model is first:
                pool.configure(second, limits)
                raise UnreachableError(TimeoutError(), timeout_s)
            return "connected"

        monkeypatch.setattr(Origin, "connect", connect)
        request = SimpleNamespace(engine=None, affinity=None, priority=0, policy=None)
        assert await reach(request, pool, 1) == "connected"  # type: ignore[arg-type, comparison-overlap]
        assert request.engine.name == "b"

    asyncio.run(test())


def test_engine_under_another_name_is_the_same_one() -> None:
    """Its fence stays, above all: its weights are what half an update left."""

    def make(**names: str) -> Model:
        return Model(name="m", upstreams=tuple(Upstreamed(name=name, url=f"http://{h}:1") for name, h in names.items()))

    pool = Pool(make(a="one", b="two"), Limits())
    pool.configure(pool.model, pool.limits)
    first, second = pool.engines
    second.fence("an update of its weights failed half-way")
    pool.configure(make(b2="two", a="one"), pool.limits)
    assert pool.engines == [second, first]
    assert (second.name, second.fenced) == ("b2", "an update of its weights failed half-way")
    pool.configure(make(b2="three", a="two", c="two"), pool.limits)
    assert first.removed
    assert second in pool.engines[1:]
    assert [engine.fenced is not None for engine in pool.engines] == [False, True, False]


def test_what_needs_a_restart_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Upstream() as engine, gateway(engine) as front:
        front.server._configured = front.relay.config
        models = [{"name": "m", "upstreams": [{"name": "a", "url": engine.url}]}]
        server = {"port": 1, "shutdown_timeout_s": 5.0, "max_body_bytes": 5000, "header_timeout_s": 9.0}
        tables = {"models": models, "server": server, "admin": {"port": front.admin_port, "sha256": "1" * 64}}
        reload(front, lambda: parse_config(tables, "test"))
        wait_until(lambda: any("read again" in message for message in caplog.messages))
    (line,) = [message for message in caplog.messages if "read again" in message]
    fixed = "server.port, server.header_timeout_s, server.shutdown_timeout_s, admin.sha256"
    assert line == f"configuration read again; not changed before a restart: {fixed}"


def test_engine_that_is_removed_is_drained(caplog: pytest.LogCaptureFixture) -> None:
    """What is in flight finishes, its connection is not kept, and both are said."""

    async def slow(exchange: Exchange) -> None:
        while not any("removed" in message for message in caplog.messages):
            await asyncio.sleep(0.001)
        await exchange.answer(b"{}")

    with (
        caplog.at_level("INFO", "laguna_serve.serving.gateway.engines.engine"),
        Upstream({PATH: slow}) as old,
        Upstream() as new,
        gateway(old) as front,
        front.connect() as connection,
    ):
        connection.sendall(make_request(PATH, b'{"model": "m"}'))
        wait_until(lambda: len(old.seen) == 1)
        (engine,) = front.relay.pools["m"].engines
        models = [{"name": "m", "upstreams": [{"name": "b", "url": new.url}]}]
        reload(front, lambda: parse_config({"models": models}, "test"))
        assert read_reply(connection).status == 200
        wait_until(lambda: engine.in_flight == 0)
        assert engine.origin._idle == []
        assert front.ask(PATH, b'{"model": "m"}').header("x-upstream") == "b"
    of_engine = [message for message in caplog.messages if message.startswith("engine a ")]
    assert of_engine == ["engine a removed; requests in flight: 1", "engine a drained"]


def test_engine_that_is_removed_in_an_update_of_weights_goes_on() -> None:
    """Its streams were held until their clients went, as nobody let it go on."""
    with RlEngine() as one, RlEngine() as two, gateway(one, two, limits={"read_timeout_s": 60.0}) as front:
        old = list(front.relay.pools["m"].engines)
        assert front.ask_admin("/pause?mode=keep", {}).status == 200
        assert (one.paused, two.paused) == (True, True)
        models = [{"name": "m", "upstreams": [{"name": "a", "url": one.url}]}]
        reload(front, lambda: parse_config({"models": models}, "test"))
        wait_until(lambda: old[1].removed)
        assert front.ask_admin("/resume", {}).status == 200
        wait_until(lambda: (one.paused, two.paused) == (False, False))
        assert [engine.origin.silence_allowed for engine in old] == [False, False]


def test_engine_that_is_gone_and_hangs_holds_up_nobody() -> None:
    async def hang(exchange: Exchange) -> None:
        await asyncio.sleep(60)

    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        assert front.ask_admin("/pause?mode=keep", {}).status == 200
        two.handlers["/resume"] = hang
        old = front.relay.pools["m"].engines[1]
        models = [{"name": "m", "upstreams": [{"name": "a", "url": one.url}]}]
        reload(front, lambda: parse_config({"models": models}, "test"))
        wait_until(lambda: old.removed)
        assert front.ask_admin("/resume", {}).status == 200
        assert front.ask(PATH, b'{"model": "m"}').status == 200
        wait_until(lambda: any("/resume" in exchange.line for exchange in two.seen))
        assert old.fenced is None


def test_requests_wait_for_engines_that_came_while_weights_changed() -> None:
    with RlEngine() as one, RlEngine() as new, gateway(one) as front, ThreadPoolExecutor(2) as beside:
        assert front.ask_admin("/pause?mode=keep", {}).status == 200
        first = beside.submit(front.ask, PATH, b'{"model": "m"}')
        wait_until(lambda: front.relay.pools["m"].queued == 1)
        models = [{"name": "m", "upstreams": [{"name": "b", "url": new.url}]}]
        reload(front, lambda: parse_config({"models": models}, "test"))
        wait_until(lambda: front.relay.pools["m"].engines[0].config.name == "b")
        second = beside.submit(front.ask, PATH, b'{"model": "m"}')
        wait_until(lambda: front.relay.pools["m"].queued == 2)
        assert front.ask_admin("/resume", {}).status == 200
        assert [asked.result(10).status for asked in (first, second)] == [200, 200]


def test_engine_that_comes_in_an_update_of_weights_answers_nothing_before_it_was_asked() -> None:
    """It has the checkpoint's; the update was none of its."""
    go_on = asyncio.Event()
    with RlEngine() as one, RlEngine() as new, gateway(one) as front, ThreadPoolExecutor(1) as beside:

        async def take_long(exchange: Exchange) -> None:
            await go_on.wait()
            await one.step(exchange)

        one.handlers["/update_weights"] = take_long
        update = {"weight_version": "7", "update": [{"names": ["w"]}]}
        updated = beside.submit(front.ask_admin, "/admin/update_weights", update)
        wait_until(lambda: any("/update_weights" in exchange.line for exchange in one.seen))
        models = [{"name": "m", "upstreams": [{"name": n, "url": u.url} for n, u in (("a", one), ("c", new))]}]
        reload(front, lambda: parse_config({"models": models}, "test"))
        wait_until(lambda: len(front.relay.pools["m"].engines) == 2)
        one._loop.call_soon_threadsafe(go_on.set)
        assert updated.result(10).json()["outcome"] == "updated"
        assert {front.ask(PATH, b'{"model": "m"}').header("x-upstream") for _ in range(6)} == {"a"}
        engine = front.relay.pools["m"].engines[1]
        wait_until(lambda: engine.fenced is not None)
        assert engine.fenced == "weights: expected version 7, got default"


@pytest.mark.slow
def test_certificate_is_renewed_at_a_reload(tmp_path: Path) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl")
    files = [str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")]

    def make(name: str) -> None:
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
        subprocess.run([*command, "-keyout", files[1], "-out", files[0]], check=True, capture_output=True)

    make("first")
    server = {"ssl_certfile": files[0], "ssl_keyfile": files[1]}
    with Upstream() as engine, gateway(engine, server=server) as front:

        def read_certificate() -> bytes:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with front.connect() as plain, context.wrap_socket(plain) as connection:
                return connection.getpeercert(binary_form=True) or b""

        front.server._configured = front.relay.config
        before = read_certificate()
        make("second")
        path = tmp_path / "gateway.toml"
        text = TEXT.replace("{url}", engine.url).replace(
            "port = 0", f'ssl_certfile = "{files[0]}"\nssl_keyfile = "{files[1]}"'
        )
        path.write_text(text)
        reload(front, lambda: load_config(path))
        wait_until(lambda: front.relay.config.server.max_body_bytes == 100_000)
        assert read_certificate() != before
