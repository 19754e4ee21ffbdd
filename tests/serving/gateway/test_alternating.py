"""Two models on a memory budget that has room for one, and 500 requests for both from clients of every kind."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from gateway_fakes import Gateway, make_request, read_reply, wait_until
from residence_fakes import PATH, owning

from laguna_serve.serving.gateway.relay.exchange import Exchange
from laguna_serve.serving.gateway.residence.model import Ticket

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS = 500, 24
# Of the whole process, test and gateway: what the allocator keeps between two looks.
MOST_GROWTH = 24 << 20


def ask_somehow(front: Gateway, number: int) -> str | None:
    """One client, who may stream, leave at once, or lose patience; what went wrong that is not its own doing."""
    dice = random.Random(number)
    model, kind = dice.choice("ab"), dice.choices(("plain", "stream", "leave", "impatient"), (4, 4, 1, 1))[0]
    body = {"model": model, "prompt": "a", "max_tokens": 3, "stream": kind == "stream" or dice.random() < 0.3}
    with front.connect() as connection:
        connection.sendall(make_request(PATH, json.dumps(body).encode()))
        if kind == "leave":
            return None
        if kind == "impatient":
            connection.settimeout(dice.random() * 0.2)
            with contextlib.suppress(TimeoutError):
                connection.recv(1)
            return None
        connection.settimeout(60)
        reply = read_reply(connection)
    said = reply.body.decode()
    if reply.status != 200 or reply.cut:
        return f"{number}: status {reply.status}, cut {reply.cut}: {said[:200]}"
    if body["stream"]:
        events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        right = [event["choices"][0]["text"] for event in events] == [model] * 3 and said.endswith("data: [DONE]\n\n")
    else:
        right = json.loads(said)["model"] == model
    return None if right else f"{number}: expected {model}'s answer, got {said[:200]}"


def count_kept() -> int:
    """Exchanges and tickets of this process, those that other tests have left among them."""
    gc.collect()
    return sum(issubclass(type(found), Exchange | Ticket) for found in gc.get_objects())  # some warn of being looked at


def test_two_models_take_turns_for_500_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {"min_residence_s": 0.5, "extra_args": ["--token-s", "0.01"]}
    limits = {"load_timeout_s": 60.0, "heartbeat_s": 0.1}
    kept = count_kept()
    with (
        owning(monkeypatch, tmp_path, {"a": table, "b": table}, limits=limits) as front,
        ThreadPoolExecutor(CLIENTS) as many,
    ):
        faults = [*many.map(lambda n: ask_somehow(front, n), range(REQUESTS // 5))]
        before = psutil.Process().memory_info().rss
        faults += many.map(lambda n: ask_somehow(front, n), range(REQUESTS // 5, REQUESTS))
        front.wait_idle(30)
        models = [front.relay.owner.find(name) for name in "ab"]
        assert [fault for fault in faults if fault] == []
        assert [(m.in_flight, len(m.waiting), m.failed) for m in models] == [(0, 0, 0)] * 2
        assert min(m.loads for m in models) >= 2
        assert not front.relay.last_errors
        assert front.relay.backlog.total == 0
        assert count_kept() - kept < CLIENTS, (
            "exchanges or tickets are kept: of 500 no more than those seen last may be"
        )
        assert psutil.Process().memory_info().rss - before < MOST_GROWTH


def test_a_port_is_closed_to_who_comes_after_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine's, too: it ended with its gateway, in the middle of an answer."""
    with owning(monkeypatch, tmp_path, {"a": {"extra_args": ["--token-s", "1"]}}) as front:
        connection = front.connect()
        connection.sendall(make_request(PATH, json.dumps({"model": "a", "stream": True}).encode()))
        wait_until(lambda: bool(front.relay.pools["a"].engines), 60)
        assert connection.recv(8)
        url = front.relay.pools["a"].engines[0].config.url
    connection.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1):
        pass
