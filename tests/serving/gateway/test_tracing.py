"""Requests as OpenTelemetry's spans: their stages, whose children they are, and what is not in them."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from gateway_fakes import SSE, Exchange, Gateway, Upstream, gateway, read_headers, wait_until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.app import open_tracer
from laguna_serve.serving.gateway.config.telemetry import Tracing
from laguna_serve.serving.gateway.telemetry.otel import OtelTracer

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}'
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = f"traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: vendor=1\r\nauthorization: Bearer sk-secret\r\n"
KEYS = [{"name": "agents", "sha256": hashlib.sha256(b"sk-secret").hexdigest()}]
Spans = dict[str, ReadableSpan]


async def stream(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b'data: {"choices": [{}]}\n\n')
    await asyncio.sleep(0.02)
    await exchange.chunk(b'data: {"choices": [{}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n')
    await exchange.end()


async def cut(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b"data: 1\n\n")
    exchange.abort()


@contextmanager
def traced(*upstreams: Upstream, provider: TracerProvider | None = None, **tables: Any) -> Iterator[tuple[Any, Any]]:
    """A gateway whose spans are kept here."""
    exporter, provider = InMemorySpanExporter(), provider or TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with gateway(*upstreams, **tables) as front:
        front.relay._tracer = OtelTracer(provider)
        yield front, exporter


def ask(front: Gateway, exporter: InMemorySpanExporter, headers: str = HEADERS) -> Spans:
    front.ask(CHAT, BODY, headers)
    front.wait_idle()
    return {span.name: span for span in exporter.get_finished_spans()}


def find_parent(spans: Spans, name: str) -> str | None:
    parent = spans[name].parent
    assert parent is not None
    return next((other.name for other in spans.values() if other.context.span_id == parent.span_id), None)


def test_spans_are_the_requests_stages() -> None:
    with Upstream({CHAT: stream}) as engine, traced(engine, keys=KEYS) as (front, exporter):
        spans = ask(front, exporter)
    server, client = spans[f"POST {CHAT}"], spans["chat m"]
    stages = {"admission", "queue", "connect"}
    assert set(spans) == {server.name, client.name, "first_byte", "stream", *stages}
    assert all(find_parent(spans, name) == server.name for name in (*stages, client.name))
    assert all(find_parent(spans, name) == client.name for name in ("first_byte", "stream"))
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert f"{server.parent.span_id:016x}" == PARENT  # type: ignore[union-attr]
    assert (server.kind, client.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    order = ["admission", "queue", "connect", "first_byte", "stream"]
    times = [time for name in order for time in (spans[name].start_time, spans[name].end_time)]
    assert times == sorted(times)  # type: ignore[type-var]
    assert server.start_time == times[0]
    assert times[-1] <= client.end_time <= server.end_time  # type: ignore[operator]
    attributes = dict(client.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "m"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (3, 2)
    assert f"http://{attributes['server.address']}:{attributes['server.port']}" == engine.url
    assert dict(server.attributes or {})["laguna.key"] == "agents"
    shown = " ".join(span.to_json() for span in spans.values())
    assert "secret" not in shown

    seen = dict(read_headers(engine.seen[0].head))
    assert seen["traceparent"] == f"00-{TRACE}-{client.context.span_id:016x}-01"
    assert seen["tracestate"] == "vendor=1"


def test_trace_begins_here_where_nobody_has_begun_it() -> None:
    with Upstream({CHAT: stream}) as engine, traced(engine) as (front, exporter):
        spans = ask(front, exporter, "traceparent: nonsense\r\n")
        assert spans[f"POST {CHAT}"].parent is None
        assert dict(read_headers(engine.seen[0].head))["traceparent"] != "nonsense"


def test_failures_are_named() -> None:
    with Upstream({CHAT: cut}) as engine, traced(engine) as (front, exporter):
        spans = ask(front, exporter)
        for name in (f"POST {CHAT}", "chat m"):
            assert spans[name].status.status_code is StatusCode.ERROR
            assert dict(spans[name].attributes or {})["error.type"] == "engine_lost"


def test_refused_request_ends_in_its_admission() -> None:
    with Upstream() as engine, traced(engine, keys=KEYS) as (front, exporter):
        spans = ask(front, exporter, "")
        assert set(spans) == {f"POST {CHAT}", "admission"}
        attributes = dict(spans[f"POST {CHAT}"].attributes or {})
        assert (attributes["http.response.status_code"], attributes["error.type"]) == (401, "missing_key")


def test_what_is_not_sampled_is_still_passed_on() -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    with Upstream({CHAT: stream}) as engine, traced(engine, provider=provider) as (front, exporter):
        assert ask(front, exporter, "") == {}
        flags = dict(read_headers(engine.seen[0].head))["traceparent"].rpartition("-")[2]
        assert int(flags, 16) & 1 == 0


def test_without_tracing_the_clients_context_passes_as_it_is() -> None:
    with Upstream() as engine, gateway(engine) as front:
        headers = dict(front.ask(CHAT, BODY, HEADERS).json()["headers"])
        assert (headers["traceparent"], headers["tracestate"]) == (f"00-{TRACE}-{PARENT}-01", "vendor=1")


def test_spans_reach_a_collector() -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(data))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
        with Upstream({CHAT: stream}) as engine, gateway(engine, tracing={"endpoint": endpoint}) as front:
            assert front.ask(CHAT, BODY).status == 200
            front.wait_idle()
        # What is left is sent when the gateway ends.
        wait_until(lambda: bool(received))
        collector.shutdown()
    (resource,) = received[0].resource_spans
    assert resource.resource.attributes[0].key in {"service.name", "telemetry.sdk.language"}
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert {f"POST {CHAT}", "chat m", "stream"} <= names


@pytest.mark.slow
def test_collector_that_is_gone_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    with Upstream({CHAT: stream}) as engine, gateway(engine, tracing={"endpoint": "http://127.0.0.1:9"}) as front:
        assert [front.ask(CHAT, BODY).status for _ in range(3)] == [200] * 3
        front.wait_idle()


def test_absent_sdk_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(name: str, *arguments: Any) -> Any:
        if name.endswith("telemetry.otel"):
            raise ImportError("No module named 'opentelemetry'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(EngineError, match=r"tracing.endpoint: expected .*; pip install 'laguna-serve\[tracing\]'"):
        open_tracer(Tracing(endpoint="http://127.0.0.1:4318"))


@pytest.mark.slow
def test_sdk_is_not_imported_where_nothing_is_traced() -> None:
    code = (
        "import sys; from laguna_serve.serving.gateway.run import serve;"
        "from laguna_serve.serving.gateway.app import create_app;"
        "from laguna_serve.serving.gateway.config import parse_config;"
        'create_app(parse_config({"models": [{"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}]}, "t"));'
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(said.replace("'", '"')) == []
