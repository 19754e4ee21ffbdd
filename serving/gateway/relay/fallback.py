"""A request that its model cannot serve goes to another one, as the model's rule has it, before a byte of an answer.

The models of the rule are tried in order, each once, and their own rules are not asked: there are no circles. Those
that the key may not ask for are passed over.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import structs

from laguna_serve.serving.gateway.access.demand import Asked
from laguna_serve.serving.gateway.access.edits import put
from laguna_serve.serving.gateway.config.tables import FallbackCause, Model
from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.journal import Journal
from laguna_serve.serving.gateway.wire.errors import GatewayError

# The refusals that each cause of a rule stands for. An engine that was lost or silent may have done a part of the work.
CAUSES: dict[FallbackCause, tuple[str, ...]] = {
    "down": ("no_engine", "engine_unreachable"),
    "lost": ("engine_lost",),
    "silent": ("engine_silent",),
    "queue_full": ("queue_full",),
    "queue_timeout": ("queue_timeout",),
    "load_failed": ("cannot_load", "load_timeout"),
}


class Router(Protocol):
    """What sends a request to another model."""

    journal: Journal

    def fall_back(self, exchange: Exchange, body: bytes, name: str, asked: Asked) -> None:
        """Send it there. Raises GatewayError."""


class Fallback:
    """The rule of one model for one request; called with what went wrong, it says whether it has taken care of that."""

    __slots__ = ("_asked", "_body", "_exchange", "_model", "_names", "_reasons", "_router")

    def __init__(self, router: Router, exchange: Exchange, body: bytes, model: Model, asked: Asked) -> None:
        self._router, self._exchange, self._body, self._model, self._asked = router, exchange, body, model, asked
        self._names = list(model.fallback)
        self._reasons = frozenset(reason for cause in model.fallback_on for reason in CAUSES[cause])

    def __call__(self, error: GatewayError) -> bool:
        """Send the request to the next model, if the error is one of the rule's."""
        exchange, key = self._exchange, self._exchange.key
        while self._names and self._asked.is_json and error.reason in self._reasons:
            name = self._names.pop(0)
            if key is not None and not key.may_ask(name, name):
                continue
            exchange.let_go()
            exchange.engine, exchange.sent_s, exchange.fallback_from = None, None, self._model.name
            self._router.journal.note_fallback(self._model.name, name, error.reason)
            try:
                body = put(self._body, self._asked, "model", name)
                self._router.fall_back(exchange, body, name, structs.replace(self._asked, model=name))
            except GatewayError as another:
                error = another
                continue
            return True
        return False
