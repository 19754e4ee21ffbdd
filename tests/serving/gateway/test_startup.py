"""The gateway starts only where its own path is the one that runs, and its settings reach the server."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from gateway_fakes import Upstream, gateway, make_request, read_reply, wait_until
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway import run
from laguna_serve.serving.gateway.app import create_app
from laguna_serve.serving.gateway.clients.answer import Answer
from laguna_serve.serving.gateway.clients.protocol import GatewayProtocol
from laguna_serve.serving.gateway.clients.startup_check import UnfitServerError, check_protocol, check_uvicorn
from laguna_serve.serving.gateway.clients.strict_http import StrictProtocol
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.config.tables import Limits
from laguna_serve.serving.gateway.run import make_settings, open_background
from laguna_serve.serving.gateway.telemetry.event_log import set_up_logging

MODEL = {"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}
CONFIG = parse_config({"server": {"port": 0}, "admin": {"port": 0}, "models": [MODEL]}, "test")


def make_uvicorn_settings() -> uvicorn.Config:
    return make_settings(create_app(CONFIG), CONFIG)


def test_this_uvicorn_is_fit() -> None:
    check_uvicorn()
    check_protocol(make_uvicorn_settings())


@pytest.mark.parametrize("version", ["0.30.6", "0.44.0", "0.48.0", "0.53.0", "0.55.0", "1.0.0"])
def test_other_versions_are_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn, "__version__", version)
    with pytest.raises(EngineError, match=rf"^uvicorn: expected 0\.54\.x, got {version}; pip install .*$"):
        open_background(CONFIG).__enter__()


def test_hook_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    with pytest.raises(UnfitServerError, match=r"expected HttpToolsProtocol\._start_asgi_task, got none"):
        check_uvicorn()


def test_field_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: RequestResponseCycle, scope: Any) -> None:
        self.scope = scope

    monkeypatch.setattr(RequestResponseCycle, "__init__", init)
    with pytest.raises(UnfitServerError, match=r"RequestResponseCycle\.on_response, got none"):
        check_uvicorn()


def test_what_answers_lack_of_a_cycle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Answer, "message_event")
    with pytest.raises(UnfitServerError, match=r"expected Answer\.message_event, got none"):
        check_uvicorn()


def test_request_that_does_not_reach_the_relay_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "on_headers_complete", StrictProtocol.on_headers_complete)
    monkeypatch.setattr(GatewayProtocol, "_start_asgi_task", lambda *_: None)
    with pytest.raises(UnfitServerError, match="expected a request to take the gateway's own path"):
        check_protocol(make_uvicorn_settings())


def test_close_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Answer.__init__

    def init(self: Answer, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **{**named, "keep_alive": True})

    monkeypatch.setattr(Answer, "__init__", init)
    with pytest.raises(UnfitServerError):
        check_protocol(make_uvicorn_settings())


def test_idle_clients_are_kept_longer_than_by_what_is_in_front() -> None:
    assert make_uvicorn_settings().timeout_keep_alive == 75


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/x", "/health", "/nope"])
def test_idle_client_is_closed_when_its_time_is_up(path: str) -> None:
    with Upstream() as engine, gateway(engine, server={"keepalive_s": 1.0}) as front, front.connect() as connection:
        connection.sendall(make_request(path))
        file = connection.makefile("rb")
        assert read_reply(connection, file).status in (200, 404)
        connection.sendall(make_request(path))
        assert read_reply(connection, file).status in (200, 404), "it was kept"
        assert file.read(1) == b""


@pytest.mark.slow
def test_rest_of_a_refused_body_does_not_keep_a_connection_for_ever() -> None:
    with Upstream() as engine, gateway(engine, server={"keepalive_s": 1.0}) as front, front.connect() as connection:
        connection.sendall(b"POST /nope HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        file = connection.makefile("rb")
        reply = read_reply(connection, file)
        assert (reply.status, reply.header("connection")) == (404, None)
        connection.sendall(b"abc")
        assert file.read(1) == b""


@pytest.mark.parametrize(
    ("table", "old", "new", "value"),
    [
        ("limits", "silence_timeout_s", "read_timeout_s", 7.0),
        ("server", "head_timeout_s", "header_timeout_s", 7.0),
        ("server", "drain_s", "shutdown_timeout_s", 7.0),
        ("server", "more_paths", "extra_paths", ("/x",)),
    ],
)
def test_old_name_of_a_key_is_taken_with_a_warning(
    table: str, old: str, new: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"models": CONFIG.model_dump()["models"]}
    with caplog.at_level(logging.WARNING):
        config = parse_config(given | {table: {old: value}}, "test")
        both = parse_config(given | {table: {old: value, new: getattr(getattr(CONFIG, table), new)}}, "test")
    assert getattr(getattr(config, table), new) == value
    assert f"{table}.{old}: its name is {new} now; rename it in the file" in caplog.messages
    assert getattr(getattr(both, table), new) == getattr(getattr(CONFIG, table), new), "the name of today goes first"


def test_answer_that_is_not_streamed_may_take_any_time() -> None:
    assert Limits().first_byte_timeout_s is None


KINDS = ("Exchange", "Answer", "BoundProtocol", "StrictProtocol", "RequestResponseCycle", "_AsgiSink", "Connection")


@pytest.mark.parametrize("asgi", [False, StrictProtocol], ids=["direct", "asgi"])
def test_what_clients_sent_is_free_without_the_garbage_collector(asgi: bool | type) -> None:
    """Nothing of a client's upload is in a reference cycle when its connection is gone.

    Uploads are broken off, refused, too large, too slow, waiting in the queue, or answered half.
    """
    tail = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n" + b"a" * 100_000

    async def half(exchange: Any) -> None:
        await exchange.start("content-type: application/json\r\ncontent-length: 100\r\n")
        exchange.writer.write(b"{")
        await exchange.writer.drain()
        await asyncio.sleep(60)

    server = {"max_body_bytes": 1 << 20, "body_timeout_s": 0.3}
    with (
        Upstream({"/v1/half": half}) as engine,
        gateway(engine, server=server, asgi=asgi, upstream={"max_in_flight": 1}) as front,
    ):
        requests = [
            tail,
            tail.replace(b"/v1/completions", b"/nope"),
            tail.replace(b"500000", b"9000000"),
            tail[:-1] + b"\r\n",
            b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffff\r\n" + b"a" * 100_000,
            b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            make_request("/v1/half", b"a" * 50_000),
            make_request("/v1/half", b"a" * 50_000) + make_request("/v1/x", b"b" * 50_000),
        ]
        gc.collect()
        gc.disable()
        try:
            with front.connect() as holder:
                holder.sendall(make_request("/v1/half", b"a" * 50_000))  # the others wait for its slot
                wait_until(lambda: bool(engine.seen))
                clients = [front.connect() for _ in requests]
                for client, request in zip(clients, requests, strict=True):
                    client.sendall(request)
                wait_until(lambda: front.relay.pools["m"].queued >= 2)
                with socket.create_connection(("127.0.0.1", front.port)) as slow:
                    slow.sendall(tail)
                    assert read_reply(slow).status == 408
                for client in clients:
                    client.close()
            front.wait_idle()
            wait_until(lambda: not front.server.server_state.connections)
            assert front.ask("/v1/x").status == 200
            wait_until(lambda: not front.server.server_state.connections)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [one for one in gc.garbage if type(one).__name__ in KINDS]
            assert left == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


@pytest.fixture
def server_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What uvicorn logs, whatever was set up for it before."""
    caplog.set_level(logging.ERROR, "uvicorn.error")
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)


def test_an_interrupted_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it ended: the process went on to its own end beside it, which left a traceback."""

    class Slow:
        force_exit = ended = interrupted = False

        def __init__(self, _listeners: object, ready: Callable[[], None], _reload: object) -> None:
            ready()

        def run(self, _sockets: object) -> None:
            wait_until(lambda: self.force_exit and Slow.interrupted, 30)
            time.sleep(0.05)
            Slow.ended = True

        def handle_exit(self, _signal: int, _frame: object) -> None:
            threading.Timer(0.1, self.interrupt).start()

        def interrupt(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            Slow.interrupted = True

    monkeypatch.setattr(run, "_make_server", Slow)
    with pytest.raises(KeyboardInterrupt), open_background(CONFIG):
        pass
    assert Slow.ended


def test_a_forced_end_is_no_error(server_log: pytest.LogCaptureFixture) -> None:
    with open_background(CONFIG) as background:
        background.server.force_exit = True  # as when requests are still in flight after shutdown_timeout_s
    assert server_log.text == ""


def test_a_form_that_cannot_be_read_is_its_senders_to_know() -> None:
    """The parser warns of each in a line of its own: a way to fill the log."""
    set_up_logging()
    assert not logging.getLogger("python_multipart.multipart").isEnabledFor(logging.WARNING)
