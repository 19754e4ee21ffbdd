"""Requests for a model whose engine the gateway owns: they wait for it here, and no request meets one that loads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from laguna_serve.serving.gateway.config.tables import Limits
from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.heartbeat import HeartbeatSink, wants_stream
from laguna_serve.serving.gateway.residence.model import Outcome, OwnedModel, Ticket
from laguna_serve.serving.gateway.residence.owner import Owner
from laguna_serve.serving.gateway.residence.place import Place
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import REQUEST_ID


def admit(
    owner: Owner, model: OwnedModel, exchange: Exchange, body: bytes, limits: Limits, go_on: Callable[[], None]
) -> None:
    """Let a request go on when its model is ready: at once, or after a wait, unless its client leaves first.

    Raises:
        GatewayError: 503 the model cannot be loaded, 429 too many wait.
    """
    exchange.model = model.name
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle() -> None:
        if not future.done():
            future.set_result(None)

    ticket = owner.ask(model, limits.load_timeout_s, settle)
    exchange.place = Place(owner, ticket)
    if ticket.outcome is Outcome.GRANTED:
        go_on()
        return
    check_ticket(ticket)
    if len(model.waiting) > limits.max_queued:
        raise errors.contended()
    if exchange.backlog is not None:
        exchange.backlog.hold(exchange, len(body))
    beats = cover(exchange) if exchange.head.method == "POST" and wants_stream(body) else None
    exchange.wait_for(_wait(ticket, future, beats, limits.heartbeat_s), lambda _: go_on())


def cover(exchange: Exchange) -> HeartbeatSink:
    """Put a sink before the client's that can be written to before there is an answer."""
    headers = [(REQUEST_ID, exchange.head.request_id)]
    if exchange.cors is not None:
        headers += exchange.cors.list_headers(exchange.head.named.get(b"origin"))
    exchange.sink = covered = HeartbeatSink(exchange.sink, exchange.head, headers)
    return covered


async def _wait(ticket: Ticket, settled: asyncio.Future[None], beats: HeartbeatSink | None, every_s: float) -> None:
    while ticket.outcome is Outcome.WAITING:
        await asyncio.wait({settled}, timeout=every_s)
        if beats is not None and ticket.outcome is Outcome.WAITING:
            beats.beat()
    check_ticket(ticket)


def check_ticket(ticket: Ticket) -> None:
    """Refuse a request whose model did not come. Raises GatewayError: 503."""
    retry_after_s = max(1, math.ceil(ticket.retry_after_s))
    if ticket.outcome is Outcome.FAILED:
        raise errors.cannot_load(ticket.cause.partition("; see ")[0], retry_after_s)
    if ticket.outcome is Outcome.TIMED_OUT:
        raise errors.load_timeout(ticket.model.state, retry_after_s)
