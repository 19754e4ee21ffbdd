"""What became of every request, for metrics, access log, status page and the gateway's own log.

Never the query, a header or a body.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from datetime import UTC, datetime

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.telemetry.access_log import AccessLog
from laguna_serve.serving.gateway.telemetry.event_log import BurstLog
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.telemetry.stages import Stages
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.kit.results import JsonObject

REMEMBERED_ERRORS = 20
logger = logging.getLogger(__name__)


class Journal:
    """Takes note of requests that have ended, and of what kept them from beginning."""

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self.last_errors: deque[JsonObject] = deque(maxlen=REMEMBERED_ERRORS)
        self._metrics, self._access_log = metrics, access_log
        self._bursts = BurstLog(logger)

    def note(self, exchange: Exchange) -> None:
        """Note that a request has ended."""
        seconds = time.perf_counter() - exchange.started_s
        self._metrics.note(exchange.head.path, exchange.status, seconds)
        if exchange.trace is not None:
            exchange.trace.end(_list_stages(exchange))
        if exchange.refusal is not None:
            self._note_refusal(exchange, exchange.refusal)
        if self._access_log.enabled or exchange.error is not None:
            self._record(exchange, seconds)

    def note_too_many_connections(self, most: int) -> None:
        """Note that a client was turned away before it could ask."""
        self._metrics.note_refusal("too_many_connections", "")
        self._bursts.write(
            "clients turned away",
            "client turned away: %d connections are open, as many as the limit of open files has room for; raise it"
            " (ulimit -Hn, LimitNOFILE=)",
            most,
        )

    def note_shortage(self, reason: str) -> None:
        """Note that this machine has run out of something that a connection needs."""
        self._bursts.write("connections that could not be opened", "connection could not be opened: %s", reason)

    def note_reload(self, *, taken: bool) -> None:
        """Note that the configuration was read again."""
        self._metrics.note_reload(taken)

    def note_fallback(self, model: str, other: str, reason: str) -> None:
        """Note that a request goes to another model than the one that it asked for."""
        self._metrics.note_fallback(model, other, reason)

    def flush(self) -> None:
        """Write what is held back."""
        self._access_log.flush()
        self._bursts.flush()

    def _note_refusal(self, exchange: Exchange, refusal: GatewayError) -> None:
        """Count a refusal.

        A failure of the gateway or its engines has a line in the log, with or without an access log.
        """
        self._metrics.note_refusal(refusal.reason, exchange.key.name if exchange.key is not None else "")
        if refusal.status < 500 or refusal.status == 501:  # the request is at fault
            return
        head, engine = exchange.head, exchange.engine
        self._bursts.write(
            f"{refusal.status} {refusal.reason}",
            "%d %s: %s (request %s, %s %s, model %s, engine %s)",
            refusal.status,
            refusal.reason,
            refusal.message,
            head.request_id.decode(),
            head.method,
            head.path if head.path.isprintable() else ascii(head.path),
            exchange.model or "-",
            exchange.cause or (engine.name if engine is not None else "-"),
        )

    def _record(self, exchange: Exchange, seconds: float) -> None:
        """Who asked for what, what became of it and how long it took."""
        head, first_s = exchange.head, exchange.first_s
        line = {
            "time": time.time(),
            "request_id": head.request_id.decode(),
            "client": exchange.client,
            "method": head.method,
            "path": head.path,
            "key": exchange.key.name if exchange.key is not None else None,
            "model": exchange.model,
            "upstream": exchange.engine.name if exchange.engine is not None else None,
            "status": exchange.status,
            "reason": exchange.refusal.reason if exchange.refusal is not None else None,
            "error": exchange.error,
        }
        if exchange.error is not None:
            self.last_errors.append(line | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
        line["ttft_ms"] = None if first_s is None else round((first_s - exchange.started_s) * 1e3, 2)
        line["total_ms"] = round(seconds * 1e3, 2)
        self._access_log.write(line)


def _list_stages(exchange: Exchange) -> Stages:
    return Stages(
        exchange.status,
        exchange.key.name if exchange.key is not None else None,
        exchange.model,
        exchange.engine.name if exchange.engine is not None else None,
        exchange.refusal.reason if exchange.refusal is not None else None,
        exchange.fallback_from,
        exchange.dispatched_s,
        exchange.arrived_s,
        exchange.sent_s,
        exchange.first_s,
        exchange.last_s,
        exchange.usage,
    )
