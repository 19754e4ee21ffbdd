"""Takes requests and sends them on their way: who may ask, which model, which engine.

What a request needs is parsed once, and of its body only `model` is read.

Requests come from the gateway's own protocol (answer.py) or from any ASGI server (asgi.py).
"""

from __future__ import annotations

import time

from laguna_serve.serving.gateway.access.asked import UnreadableError, read_asked
from laguna_serve.serving.gateway.access.demand import Asked, estimate
from laguna_serve.serving.gateway.access.edits import ask_usage, find_priority, set_priority
from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.config.tables import Upstream
from laguna_serve.serving.gateway.counts.counts import Counts
from laguna_serve.serving.gateway.engines.catalog import MODELS, Catalog
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.relay import open_files
from laguna_serve.serving.gateway.relay.admission import admit
from laguna_serve.serving.gateway.relay.affinity import find_affinity
from laguna_serve.serving.gateway.relay.charge import find_used
from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.relay.fallback import Fallback
from laguna_serve.serving.gateway.relay.journal import Journal
from laguna_serve.serving.gateway.relay.shadow import Shadows
from laguna_serve.serving.gateway.relay.sink import Sink
from laguna_serve.serving.gateway.residence.model import State
from laguna_serve.serving.gateway.residence.owner import Owner
from laguna_serve.serving.gateway.telemetry.access_log import AccessLog
from laguna_serve.serving.gateway.telemetry.keys import KeyMetrics
from laguna_serve.serving.gateway.telemetry.metrics import EngineStats, Metrics
from laguna_serve.serving.gateway.telemetry.owned import OwnedMetrics
from laguna_serve.serving.gateway.telemetry.stages import Tracer
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.client_address import Proxies
from laguna_serve.serving.gateway.wire.codings import check_codings
from laguna_serve.serving.gateway.wire.cors import Cors
from laguna_serve.serving.gateway.wire.headers import Head, read_length
from laguna_serve.serving.gateway.wire.paths import check_loads, check_path
from laguna_serve.serving.machine.open_files import find_limit

JSON = ((b"content-type", b"application/json"),)
# Of a request that needs no key.
MAX_OPTIONS_BYTES = 64 << 10


class Relay:
    """All requests of a gateway, and the pools that they go to."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        shadows: Shadows,
        log: AccessLog,
        catalog: Catalog,
        ledger: Ledger,
        tracer: Tracer | None,
        counts: Counts,
    ) -> None:
        self.pools: dict[str, Pool] = {}
        self.keys, self._tracer, self._counts = Keyring(ledger, make=counts.make_holder), tracer, counts
        self.leaving = self.draining = False
        self.backlog = counts.make_backlog(config.limits.max_queued_bytes)
        metrics.backlog = self.backlog
        self.exchanges: set[Exchange] = set()
        self._metrics = metrics
        self._shadows = shadows
        self.journal = Journal(metrics, log)
        self.last_errors = self.journal.last_errors
        self.catalog = catalog
        self.owner, self._stats = Owner(), dict[str, EngineStats]()
        self.owner.place = self._place
        metrics.registry.register(OwnedMetrics(self.owner.scheduler.models, list(State)))
        metrics.registry.register(KeyMetrics(self.keys))
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take a configuration, at the start or in between.

        Requests in flight and in queues go on where they are. Whatever can fail is made before anything is replaced.
        """
        make, limits = self._counts.make_pool, config.limits
        pools = {model.name: self.pools.get(model.name) or make(model, limits) for model in config.models}
        models = self.owner.complete(config)
        engines = {model.name: pools[model.name].plan(model) for model in models}
        cors, proxies = Cors(config.server.allowed_origins), Proxies(config.server.trusted_proxies)
        limit = find_limit()
        open_files.warn_if_low(config, limit)

        self.config = config
        self.owner.configure(config)
        for model in models:
            pools[model.name].configure(model, config.limits, engines[model.name])
        for name in self.pools.keys() - pools.keys():
            self.pools[name].remove()
        self.pools = pools
        self._metrics.pools = pools
        self.catalog.configure(pools)
        self.keys.configure(config.all_keys, closed=config.asks_for_keys)
        self.cors, self._proxies = cors if cors.enabled else None, proxies
        self.backlog.most = config.limits.max_queued_bytes
        self._most_body_bytes = min(config.server.max_body_bytes, config.limits.max_queued_bytes)
        self.max_connections = open_files.find_max_connections(config, limit)

    def refresh(self) -> None:
        """Look at what counts for several processes, before it is shown."""
        for pool in self.pools.values():
            pool.refresh()
        for holder in self.keys.holders:
            holder.refresh()

    def close(self) -> None:
        """End what is still in flight, and the connections to the engines."""
        for exchange in list(self.exchanges):
            exchange.fail(errors.stopped())
        for pool in self.pools.values():
            pool.close()
        self.journal.flush()

    def begin(self, head: Head, sink: Sink) -> Exchange:
        """Take a request whose body is still to come; it may have been refused, and finished, already."""
        exchange = Exchange(head, sink, self._finish)
        exchange.cors, exchange.backlog, exchange.keys_are_ours = self.cors, self.backlog, self.keys.enabled
        exchange.client, exchange.forwarded_for = self._proxies.find_client(head)
        if self._tracer is not None:
            exchange.trace = self._tracer.begin(head, exchange.started_s)
        self.exchanges.add(exchange)
        exchange.attempt(lambda: self._check(exchange))
        return exchange

    def _check(self, exchange: Exchange) -> None:
        """Check a request by its head, and answer what needs no more. Raises GatewayError."""
        head, is_options = exchange.head, exchange.head.method == "OPTIONS"
        if self.draining:
            raise errors.draining()
        if not is_options:  # browsers send preflights without a key
            exchange.key = self.keys.find(head.named)
            exchange.claim = None if exchange.key is None else exchange.key.enter()
        check_path(head, self.config.server.extra_paths)
        check_codings(head.headers, head.named)
        if announced := read_length(head.named):
            self.check_size(announced, is_options=is_options)
            self.backlog.check(announced)
        if self.cors is not None and is_options and (answer := self.cors.answer_preflight(head)) is not None:
            exchange.reply(*answer)

    def has_heard_from(self, engine: Engine, since_s: float) -> bool:
        """Whether a piece of an answer under way has come from the engine since then (`time.perf_counter`)."""
        return any(exchange.engine is engine and exchange.last_s > since_s for exchange in self.exchanges)

    def note_shortage(self, reason: str) -> None:
        """Note that this machine has run out of something that a connection needs."""
        self.journal.note_shortage(reason)

    def check_size(self, size: int, *, is_options: bool = False) -> None:
        """Check a body of so many bytes so far. Raises GatewayError: 413 it is more than the gateway takes."""
        most = min(self._most_body_bytes, MAX_OPTIONS_BYTES) if is_options else self._most_body_bytes
        if size > most:
            raise errors.body_too_large(most)

    def hold(self, exchange: Exchange, size: int) -> None:
        """Count the bytes that have come of a request's body by now; none of one that has been answered already.

        Raises GatewayError: 413, or 429 they are too many together with all that wait.
        """
        if exchange.finished:
            return
        self.check_size(size, is_options=exchange.head.method == "OPTIONS")
        self.backlog.hold(exchange, size)

    def send(self, exchange: Exchange, body: bytes) -> None:
        """Find the model and an engine for a body that is there, or answer what the gateway knows itself."""
        if not exchange.finished:
            exchange.attempt(lambda: self._send(exchange, body))

    def _send(self, exchange: Exchange, body: bytes) -> None:
        self.check_size(len(body), is_options=exchange.head.method == "OPTIONS")
        if not (exchange.head.path.startswith(MODELS) and self._tell_models(exchange)):
            self._route(exchange, body)

    def _route(self, exchange: Exchange, body: bytes) -> None:
        """Choose the pool by the body's `model`; what names none goes to the only model, or to the first.

        With one model, what it is called otherwise is its engines' to know if they know names, and what is wrong with a
        body theirs to say.
        """
        alone = next(iter(self.pools.values())) if len(self.pools) == 1 else None
        try:
            asked = read_asked(body, exchange.head.named.get(b"content-type", b""))
        except UnreadableError as error:
            if alone is None:
                raise errors.bad_request(str(error)) from None
            asked = Asked()
        if asked.model is None:
            allowed = (pool for pool in self.pools.values() if _is_allowed(exchange.key, pool, None))
            if (pool := next(allowed, None)) is None:
                raise errors.hidden_model("")
            self._dispatch(exchange, body, pool, asked)
        elif (pool := self.catalog.find(asked.model)) is not None:
            self._dispatch(exchange, body, pool, asked)
        else:
            search = self._search(asked.model, alone)
            exchange.wait_for(search, lambda found: self._dispatch(exchange, body, found, asked))

    async def _search(self, name: str, alone: Pool | None) -> Pool:
        """Search for a name's model.

        An engine that lists no models would answer to any name, so that the only model's own is asked for then.
        """
        if (pool := await self.catalog.search(name)) is None:
            pool = alone if alone is not None and not self.catalog.is_nameless(alone) else None
        if pool is None:
            raise self.catalog.explain_unknown(name)
        return pool

    def _dispatch(self, exchange: Exchange, body: bytes, pool: Pool, asked: Asked) -> None:
        """Send a request to a model that its key may ask for, within its limits. Raises GatewayError."""
        exchange.dispatched_s, exchange.model = time.perf_counter(), pool.model.name
        affinity = find_affinity(pool, exchange.head, body, exchange.key)
        if pool.model.fallback and exchange.recover is None:
            exchange.recover = Fallback(self, exchange, body, pool.model, asked)
        sent = self._charge(exchange, exchange.key, body, pool, asked) if exchange.key is not None else body
        if exchange.fallback_from is None:
            self._shadows.accompany(pool.model, exchange, body)
        if (model := self.owner.find(pool.model.name)) is None:
            exchange.send(pool, sent, affinity)
        else:
            if not model.serves:
                absent = self.owner.routes.find_absent(pool.model.engine)
                check_loads(exchange.head, self.config.server.extra_paths, model.name, absent)
            admit(self.owner, model, exchange, sent, pool.limits, lambda: exchange.send(pool, sent, affinity))

    def _charge(self, exchange: Exchange, key: Holder, body: bytes, pool: Pool, asked: Asked) -> bytes:
        """Take what a request costs from its key's limits, and make its body what engines get. Raises GatewayError."""
        model, path = pool.model, exchange.head.path
        if not _is_allowed(key, pool, asked.model):
            raise errors.hidden_model(asked.model or "")
        assert exchange.claim is not None
        assumed = self.config.access.assumed_output_tokens
        key.reserve(exchange.claim, model.name, estimate(path, asked, len(body), assumed))
        exchange.priority = find_priority(asked, key.key.priority)
        asking = ask_usage(path, body, asked) if model.ask_usage else None
        body, exchange.drops_usage = (body, False) if asking is None else (asking, True)
        return set_priority(path, body, asked, exchange.priority) if model.pass_priority else body

    def fall_back(self, exchange: Exchange, body: bytes, name: str, asked: Asked) -> None:
        """Send a request to another model. Raises GatewayError."""
        if (pool := self.pools.get(name)) is None:  # a reload has taken it out meanwhile
            raise errors.unknown_model(name)
        self._dispatch(exchange, body, pool, asked)

    def _place(self, name: str, upstream: Upstream | None) -> None:
        """Take where the engine of a model is now that the gateway owns; None: it has none.

        One that a reload has given to others' engines meanwhile keeps those.
        """
        pool = self.pools.get(name)
        if pool is not None and pool.model.engine is not None:
            upstreams = () if upstream is None else (upstream,)
            pool.configure(pool.model.model_copy(update={"upstreams": upstreams}), pool.limits)
            for engine in pool.engines:  # its counters go on where those of the last one were
                engine.stats = self._stats.setdefault(name, engine.stats)

    def _tell_models(self, exchange: Exchange) -> bool:
        """Answer what the gateway knows of models by itself: one by its name, and all where no engine lists all.

        False if this is for an engine.
        """
        head = exchange.head
        if head.method not in ("GET", "HEAD"):
            return False
        if head.path.startswith(MODELS + "/") and (name := head.path.removeprefix(MODELS + "/")):
            exchange.wait_for(self._render_model(name, exchange.key), lambda body: exchange.reply(200, JSON, body))
            return True
        first, restricted = self.config.models[0], exchange.key is not None and bool(exchange.key.key.models)
        alone = len(self.pools) == 1 and not first.aliases and first.engine is None
        if head.path != MODELS or (alone and not restricted):
            return False
        shown = self.catalog.render_list(lambda pool, name: _is_allowed(exchange.key, pool, name))
        exchange.wait_for(shown, lambda body: exchange.reply(200, JSON, body))
        return True

    async def _render_model(self, name: str, key: Holder | None) -> bytes:
        if (body := await self.catalog.render_model(name)) is None:
            raise self.catalog.explain_unknown(name)
        pool = self.catalog.find(name)
        if pool is None or not _is_allowed(key, pool, name):
            raise errors.hidden_model(name)
        return body

    def _finish(self, exchange: Exchange) -> None:
        self.exchanges.discard(exchange)
        if exchange.key is not None and exchange.claim is not None:
            exchange.key.leave(exchange.claim, find_used(exchange, exchange.claim))
        self.journal.note(exchange)


def _is_allowed(key: Holder | None, pool: Pool, name: str | None) -> bool:
    return key is None or key.may_ask(pool.model.name, name)
