"""What a request has cost its key, when it has ended: what its engine told, else at least what was seen of it."""

from __future__ import annotations

from laguna_serve.serving.gateway.access.demand import NOTHING, Demand, is_free
from laguna_serve.serving.gateway.access.holder import Claim
from laguna_serve.serving.gateway.relay.exchange import CLIENT_GONE, Exchange
from laguna_serve.serving.gateway.telemetry.usage import read_usage
from laguna_serve.serving.gateway.wire.sse import RESPONSES


def find_used(exchange: Exchange, claim: Claim) -> Demand | None:
    """Find what a request has cost; None if no engine had it, nothing for what makes no tokens.

    An answer that is complete and tells nothing costs what was estimated, of a stream a token per piece. One that ended
    early costs its prompt, by the estimate if nothing better is known, and a token per piece that came.
    """
    if exchange.sent_s is None:
        return None
    if is_free(exchange.head.method, exchange.head.path):
        return NOTHING
    if exchange.usage is not None:
        prompt, output = exchange.usage  # of some streams the beginning alone tells the prompt's
        return Demand(prompt or claim.demand.prompt, output)
    if exchange.status not in (200, CLIENT_GONE) or claim.demand is NOTHING:
        return NOTHING
    if exchange.complete and not exchange.streams:
        return claim.demand
    # Responses tell nothing before their end, and repeat the request's tools, in whose schemas anything may stand.
    is_untold = exchange.complete or exchange.head.path.startswith(RESPONSES)
    told = None if is_untold else read_usage(b"".join(exchange.recent))
    prompt, output = told or (0, 0)
    return Demand(prompt or claim.demand.prompt, max(output, exchange.chunks if exchange.streams else 0))
