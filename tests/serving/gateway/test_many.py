"""Thousands of keys and hundreds of engines: what is done for each of them is done once, and streams go on."""

from __future__ import annotations

import threading
from typing import Any

import jinja2
import pytest
from gateway_fakes import Upstream, gateway, wait_until

from laguna_serve.serving.gateway import app
from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config import Config, parse_config, tables
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.counts.board import ROWS, BoardFullError
from laguna_serve.serving.gateway.counts.rows import list_rows
from laguna_serve.serving.gateway.telemetry import metrics
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.workers.team import open_team

PATH = "/v1/completions"


def make_keys(count: int) -> list[dict[str, str]]:
    return [{"name": f"key-{i}", "sha256": f"{i:064x}"} for i in range(count)]


def make_config(upstreams: list[dict[str, Any]], keys: int = 0) -> Config:
    return parse_config({"models": [{"name": "m", "upstreams": upstreams}], "keys": make_keys(keys)}, "test")


class CountedName(str):
    compared = 0

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return super().__eq__(other)


def test_names_are_not_compared_with_all_others() -> None:
    names: list[str] = [CountedName(i) for i in range(1000)]
    tables._require_distinct("keys", names)
    assert CountedName.compared <= 10 * len(names)
    with pytest.raises(ValueError, match="got '7' twice"):
        tables._require_distinct("keys", [*names, CountedName(7), CountedName(9)])


def test_engines_that_trust_the_same_share_what_is_read_for_it() -> None:
    some = [{"name": f"e{i}", "url": f"https://h:{i}", "tls_verify": i % 2 == 0} for i in range(1, 9)]
    first, again = make_config(some), make_config(some)
    for config in (first, again):
        contexts = [upstream.tls for upstream in config.models[0].upstreams]
        assert len(set(contexts)) == 2
        assert contexts[0] is contexts[2] is not contexts[1]
    assert first.models[0].upstreams[0].tls is not again.models[0].upstreams[0].tls  # authorities are read again


class CountedHolder(Holder):
    looked = 0

    @property
    def digest(self) -> bytes:
        CountedHolder.looked += 1
        return self._digest

    @digest.setter
    def digest(self, given: bytes) -> None:
        self._digest = given


def test_wrong_key_is_not_compared_with_all_keys() -> None:
    keyring = Keyring(Ledger(), make=CountedHolder)
    keyring.configure([Key.model_validate(key) for key in make_keys(500)])
    CountedHolder.looked = 0
    for i in range(20):
        with pytest.raises(GatewayError):
            keyring.find({b"x-api-key": b"wrong %d" % i})
    assert CountedHolder.looked <= 20


def test_requests_go_on_while_a_configuration_is_read() -> None:
    answered, reads = threading.Event(), []

    def read() -> Config:
        reads.append(threading.current_thread())
        assert answered.wait(30)
        return config

    with Upstream() as engine, gateway(engine) as front:
        config = front.relay.config
        front.server._reload = read
        for _ in range(3):  # the last two while the first is being obeyed
            front.loop.call_soon_threadsafe(front.server.reload)
            wait_until(lambda: bool(reads))
            assert front.ask(PATH, b'{"model": "m"}').status == 200
        answered.set()
        wait_until(lambda: front.server._reading is None)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [(app, "merge", "/metrics"), (metrics, "generate_latest", "/metrics"), (jinja2.Template, "render", "/")],
)
def test_long_texts_are_written_beside_the_streams(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: str
) -> None:
    threads, write = [], getattr(module, name)

    def note(*given: Any, **named: Any) -> Any:
        threads.append(threading.get_ident())
        return write(*given, **named)

    monkeypatch.setattr(module, name, note)
    with Upstream() as engine, gateway(engine) as front:
        reply = front.ask(path) if path == "/metrics" else front.ask_admin(path)
        assert reply.status == 200
        front.server.call(lambda _: threads.append(threading.get_ident()))
    assert len(set(threads)) == 2


@pytest.mark.parametrize("keys", [10, ROWS + 1])
def test_workers_have_room_for_every_name_and_for_more(keys: int) -> None:
    config = make_config([{"name": "e", "url": "http://h:1"}], keys)
    names = list_rows(config)
    assert len(names) == keys + 3
    with open_team(2, config) as team:
        team.check_room(config)
        rows = {team.board.find_row(name) for name in names}
        assert len(rows) == keys + 3
        assert len({team.board.find_row(f"later {i}") for i in range(ROWS // 4)} | rows) == keys + 3 + ROWS // 4
        team.check_room(config)
        with pytest.raises(
            BoardFullError, match=r"expected at most \d+ names of keys, models and engines since the st"
        ):
            team.check_room(make_config([{"name": "e", "url": "http://h:1"}], 4 * (keys + ROWS)))
