"""Refuses to start under a uvicorn that would not run the gateway's protocol as it must.

protocol.py overrides private methods, and puts an `Answer` where uvicorn keeps its cycle. In a uvicorn that does not
call them requests would reach the relay by the ASGI application, slower and without some time limits, and nobody would
notice (before 0.45); in others `Connection: close` is ignored (0.45 to 0.52). So the version must be one that the tests
run with, an `Answer` must have what uvicorn's protocol uses of a cycle, and a request through the protocol, in memory,
must take the fast path.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from laguna_serve.serving.gateway.clients.answer import Answer
from laguna_serve.serving.gateway.clients.protocol import GatewayProtocol
from laguna_serve.serving.gateway.clients.turns import Turns
from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.sink import Sink
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import Head

# Minor versions that the tests have run with.
TESTED = ("0.54",)
HOOKS = ("_start_asgi_task", "_unset_keepalive_if_required", "on_response_complete", "send_400_response")
CYCLE = ("body", "more_body", "keep_alive", "response_complete", "on_response")
PROBE = b"GET /v1/models HTTP/1.1\r\nhost: probe\r\nconnection: close\r\n\r\n"
ADVICE = "; pip install 'uvicorn[standard]>=0.54,<0.55'"


class UnfitServerError(RuntimeError):
    """uvicorn is not as the gateway needs it; one line."""


def check_uvicorn() -> None:
    """Check the version, and what the gateway overrides.

    Raises:
        UnfitServerError: it is another one.
    """
    if not uvicorn.__version__.startswith(tuple(f"{minor}." for minor in TESTED)):
        expected = " or ".join(f"{minor}.x" for minor in TESTED)
        raise UnfitServerError(f"uvicorn: expected {expected}, got {uvicorn.__version__}" + ADVICE)
    source = inspect.getsource(RequestResponseCycle.__init__)
    absent = [f"HttpToolsProtocol.{name}" for name in HOOKS if not hasattr(HttpToolsProtocol, name)]
    absent += [f"RequestResponseCycle.{name}" for name in CYCLE if f"self.{name}" not in source]
    used = sorted(set(re.findall(r"self\.cycle\.(\w+)", inspect.getsource(HttpToolsProtocol))))
    absent += [f"Answer.{name}" for name in used if not hasattr(Answer, name)]
    if absent:
        raise UnfitServerError(f"uvicorn {uvicorn.__version__}: expected {', '.join(absent)}, got none" + ADVICE)


def check_protocol(settings: uvicorn.Config) -> None:
    """Check that a request through the protocol of these settings is answered by the relay, not by the application.

    Its connection must end as it asks.

    Raises:
        UnfitServerError: it is not.
    """
    protocol_class: Any = settings.http_protocol_class if settings.loaded else settings.http
    relay, transport, loop = _Probe(), Wire(), asyncio.new_event_loop()
    own = {"find_relay": staticmethod(lambda: relay), "turns": Turns()}
    bound = type("ProbeProtocol", (protocol_class,), own)
    try:
        config = uvicorn.Config(relay.run_as_application, http=bound, ws="none", lifespan="off", log_config=None)
        protocol: GatewayProtocol = bound(config=config, server_state=ServerState(), app_state={}, _loop=loop)
        protocol.connection_made(transport)  # type: ignore[arg-type]
        protocol.data_received(PROBE)
        found = (len(relay.begun), transport.written.startswith(b"HTTP/1.1 503 "), transport.closed)
        protocol.connection_lost(None)
    finally:
        loop.close()
    if found != (1, True, True):
        raise UnfitServerError(
            f"uvicorn {uvicorn.__version__}: expected a request to take the gateway's own path, be answered and its "
            f"connection to close, got {found}" + ADVICE
        )


class _Probe:
    """A relay that refuses everything, and an application that must not be asked."""

    max_connections = 1

    def __init__(self) -> None:
        self.begun: list[Exchange] = []

    def begin(self, head: Head, sink: Sink) -> Exchange:
        exchange = Exchange(head, sink, self.begun.append)
        exchange.fail(errors.draining())
        return exchange

    async def run_as_application(self, scope: object, receive: object, send: object) -> None:
        raise AssertionError


class Wire:
    """A transport without a network."""

    def __init__(self) -> None:
        self.written, self.closed = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
