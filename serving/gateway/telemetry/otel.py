"""Requests as OpenTelemetry's spans, by its own SDK, which sends them in batches from a thread of its own.

A request is a server's span with its admission, its wait for a slot and for a connection; its engine's part is a
client's span by the conventions for generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/), with the wait
for the first byte and the stream after it. Neither prompts nor keys are in them; keys' names are.
"""

from __future__ import annotations

import time

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from laguna_serve.serving.gateway.config.telemetry import Tracing
from laguna_serve.serving.gateway.telemetry.metrics import KNOWN_PATHS
from laguna_serve.serving.gateway.telemetry.stages import Stages
from laguna_serve.serving.gateway.wire.headers import CONTEXT, Head
from laguna_serve.serving.gateway.wire.redirects import Site

PATH = "/v1/traces"
# For one batch with all attempts; the gateway's end waits for the last one.
EXPORT_S = 3
# What OpenTelemetry calls what a path asks for; of other paths the engine's span has the server's name.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
PROPAGATOR = TraceContextTextMapPropagator()
Values = dict[str, str | int | float]


def make_tracer(settings: Tracing) -> OtelTracer:
    """Make what sends spans to the configured endpoint."""
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=Resource.create({SERVICE_NAME: settings.service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{settings.endpoint}{PATH}", timeout=EXPORT_S)))
    return OtelTracer(provider)


class OtelTracer:
    """Begins the traces of a gateway."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider, self._tracer = provider, provider.get_tracer("laguna_serve.serving.gateway")

    def begin(self, head: Head, started_s: float) -> OtelTrace:
        """Begin a request's trace, under the one that its `traceparent` names."""
        return OtelTrace(self._tracer, head, started_s)

    def close(self) -> None:
        """Send what has not been sent yet; blocks for as long as the exporter may take."""
        self._provider.shutdown()


class OtelTrace:
    """The spans of one request."""

    def __init__(self, tracer: trace.Tracer, head: Head, started_s: float) -> None:
        self._tracer, self._path, self._started_s = tracer, head.path, started_s
        # Spans have the time of day, the gateway measures by a clock that never jumps.
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        carrier = {name.decode(): head.named[name].decode("latin-1") for name in CONTEXT & head.named.keys()}
        route = head.path if head.path in KNOWN_PATHS else ""
        values: Values = {"http.request.method": head.method, "url.path": head.path, "url.scheme": "http"}
        values |= {"http.route": route} if route else {}
        values["laguna.request_id"] = head.request_id.decode()
        self._server = tracer.start_span(
            f"{head.method} {route}".rstrip(),
            PROPAGATOR.extract(carrier, context.Context()),
            SpanKind.SERVER,
            values,
            start_time=self._to_ns(started_s),
        )
        self._inside = trace.set_span_in_context(self._server, context.Context())
        self._client: Span | None = None

    def enter_engine(self, site: Site) -> bytes:
        """Begin the engine's part; returns the header lines that carry the trace on."""
        if self._client is not None:  # that one had it in vain
            self._client.set_status(StatusCode.ERROR)
            self._client.end()
        values: Values = {"server.address": site.host, "server.port": site.port}
        self._client = self._tracer.start_span(
            OPERATIONS.get(self._path, "engine"), self._inside, SpanKind.CLIENT, values
        )
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, trace.set_span_in_context(self._client, context.Context()))
        return "".join(f"{name}: {value}\r\n" for name, value in carrier.items()).encode("latin-1")

    def end(self, stages: Stages) -> None:
        """End all of it, with what became of the request."""
        now_s = time.perf_counter()
        if self._server.is_recording():
            waits = (
                ("admission", self._started_s, stages.dispatched_s),
                ("queue", stages.dispatched_s, stages.arrived_s),
                ("connect", stages.arrived_s, stages.sent_s),
            )
            for name, begin_s, end_s in waits:
                self._add(name, self._inside, begin_s, end_s or (now_s if begin_s else 0.0))
                if not end_s:
                    break  # it ended there
        if self._client is not None:
            self._end_client(self._client, stages, now_s)
        values: Values = {"http.response.status_code": stages.status}
        named = {"laguna.key": stages.key, "laguna.model": stages.model, "laguna.upstream": stages.engine}
        named |= {"laguna.fallback_from": stages.fallback_from, "error.type": stages.reason}
        values |= {name: value for name, value in named.items() if value is not None}
        self._server.set_attributes(values)
        if stages.status >= 500 or (stages.reason is not None and stages.status == 200):
            self._server.set_status(Status(StatusCode.ERROR))
        self._server.end(self._to_ns(now_s))

    def _end_client(self, client: Span, stages: Stages, now_s: float) -> None:
        """End the engine's part, with the stages of its answer and what it told of tokens."""
        operation, model = OPERATIONS.get(self._path), stages.model or ""
        values: Values = {"http.response.status_code": stages.status}
        if operation is not None:
            client.update_name(f"{operation} {model}")
            values |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm"}
            values["gen_ai.request.model"] = model
        if stages.usage is not None:
            values |= {"gen_ai.usage.input_tokens": stages.usage[0], "gen_ai.usage.output_tokens": stages.usage[1]}
        if stages.reason is not None or stages.status >= 400:
            values["error.type"] = stages.reason or str(stages.status)
            client.set_status(Status(StatusCode.ERROR))
        client.set_attributes(values)
        if client.is_recording() and stages.sent_s is not None:
            inside = trace.set_span_in_context(client, context.Context())
            self._add("first_byte", inside, stages.sent_s, stages.first_s or now_s)
            if stages.first_s is not None:
                self._add("stream", inside, stages.first_s, max(stages.last_s, stages.first_s))
        client.end(self._to_ns(now_s))

    def _add(self, name: str, inside: context.Context, begin_s: float, end_s: float) -> None:
        """Add a stage that is over."""
        span = self._tracer.start_span(name, inside, start_time=self._to_ns(begin_s))
        span.end(self._to_ns(end_s))

    def _to_ns(self, at_s: float) -> int:
        return int(at_s * 1e9) + self._offset_ns
