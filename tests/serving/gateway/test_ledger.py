"""What was used outlives the gateway: the file is whole at every moment, and one that fails is tried again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import Exchange, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.access import ledger as ledger_module
from laguna_serve.serving.gateway.access.demand import Demand
from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.ledger import Ledger, Tally
from laguna_serve.serving.gateway.app import create_app
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.config.keys import Key

DAY_S, DAY = 86_400, 20_000
CHAT, BODY, KEY = "/v1/chat/completions", b'{"model": "m"}', "x-api-key: sk\r\n"
DIGEST = hashlib.sha256(b"sk").hexdigest()


async def answer(exchange: Exchange) -> None:
    await exchange.answer(b'{"usage": {"prompt_tokens": 11, "completion_tokens": 5}}')


def make_tables(path: Path, every_s: float = 3600.0) -> dict[str, Any]:
    access = {"usage_file": str(path), "usage_write_s": every_s}
    return {"access": access, "keys": [{"name": "k", "sha256": DIGEST, "tokens_per_day": 2000}]}


def read_file(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT key, model, requests, prompt_tokens, output_tokens, refused FROM usage").fetchall()


def write(ledger: Ledger) -> None:
    asyncio.run(ledger.write())


def test_restart_gives_no_budget_back(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with Upstream({CHAT: answer}) as engine:
        for number in (1, 2):
            with gateway(engine, **make_tables(path)) as front:
                assert front.ask(CHAT, BODY, KEY).status == 200
                front.wait_idle()
                found = front.ask_admin("/admin/usage").json()["keys"]["k"]
                assert (found["tokens_today"], found["budget_left_tokens"]) == (16 * number, 2000 - 16 * number)
                assert found["since_start"]["m"]["requests"] == 1
                assert found["today"]["m"]["requests"] == number
            assert read_file(path) == [("k", "m", number, 11 * number, 5 * number, 0)]


def test_file_is_written_while_the_gateway_runs(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with Upstream({CHAT: answer}) as engine, gateway(engine, **make_tables(path, 0.05)) as front:
        assert front.ask(CHAT, BODY, KEY).status == 200
        wait_until(lambda: read_file(path) == [("k", "m", 1, 11, 5, 0)])


@contextmanager
def process(path: Path, url: str, usage: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A gateway of its own, and its port."""
    path.write_text(
        f'[access]\nusage_file = "{usage}"\nusage_write_s = 0.05\n[[keys]]\nname = "k"\nsha256 = "{DIGEST}"\n'
        f'[[models]]\nname = "m"\n[[models.upstreams]]\nname = "a"\nurl = "{url}"\n'
    )
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--config", str(path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, int(server.stdout.readline().split()[2].rpartition(":")[2])
        finally:
            server.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_gateway_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    usage = tmp_path / "usage.sqlite"
    with Upstream({CHAT: answer}) as engine, process(tmp_path / "g.toml", engine.url, usage) as (server, port):
        for _ in range(40):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(make_request(CHAT, BODY, KEY))
                assert read_reply(connection).status == 200
        wait_until(lambda: bool(read_file(usage)))
        server.send_signal(signal.SIGKILL)
        server.wait(10)
    ((_, _, requests, prompt, output, _),) = read_file(usage)
    assert 1 <= requests <= 40
    assert (prompt, output) == (11 * requests, 5 * requests), "each write is whole"
    assert Ledger(usage).find(int(time.time() // DAY_S), "k")["m"].requests == requests


def test_two_gateways_add_to_one_file(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / "u.sqlite", lambda: DAY * DAY_S) for _ in range(2)]
    for ledger in ledgers:
        ledger.find_row(DAY, "k", "m").add(Tally(1, 2, 3, 4))
        write(ledger)
    assert read_file(tmp_path / "u.sqlite") == [("k", "m", 2, 4, 6, 8)]


def test_new_day_begins_empty_and_the_old_one_stays_in_the_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "u.sqlite", lambda: DAY * DAY_S)
    ledger.find_row(DAY, "k", "m").add(Tally(1))
    ledger.find_row(DAY + 1, "k", "m").add(Tally(2))
    write(ledger)
    assert ledger.find(DAY + 1, "k") == {"m": Tally(2)}
    assert Ledger(tmp_path / "u.sqlite", lambda: DAY * DAY_S).find(DAY, "k") == {"m": Tally(1)}
    assert Ledger(tmp_path / "u.sqlite", lambda: (DAY + 1) * DAY_S).find(DAY + 1, "k") == {"m": Tally(2)}


def test_clock_that_is_set_gives_no_budget_back(tmp_path: Path) -> None:
    """Over midnight and back, and on a machine that learns the day after the start."""
    now, key = [DAY * DAY_S + 1.0], Key(name="k", sha256=DIGEST, tokens_per_day=100)

    def clock() -> float:
        return now[0]

    def use(holder: Holder) -> int | None:
        claim = holder.enter()
        holder.leave(claim, Demand(60, 10))
        return holder.budget_left

    ledger = Ledger(tmp_path / "u.sqlite", clock)
    holder = Holder(key, ledger, clock, clock)
    assert use(holder) == 30
    for written in (True, False):
        if written:
            write(ledger)
        now[0] -= 2
        assert holder.budget_left == 100
        now[0] += 2
        assert (holder.budget_left, ledger.find(DAY, "k")) == (30, {"": Tally(1, 60, 10)})
    write(ledger)
    assert read_file(tmp_path / "u.sqlite") == [("k", "", 1, 60, 10, 0)]
    ledger.close()
    now[0] -= DAY_S
    holder = Holder(key, Ledger(tmp_path / "u.sqlite", clock), clock, clock)
    assert holder.budget_left == 100
    now[0] += DAY_S
    assert holder.budget_left == 30


def test_start_years_ahead_gives_no_budget_back(tmp_path: Path) -> None:
    """As on a machine whose clock is wrong until it has asked for the time."""
    path = tmp_path / "usage.db"

    def use(day: int) -> int:
        ledger = Ledger(path, lambda: day * DAY_S)
        ledger.find_row(day, "k", "m").prompt_tokens += 1
        asyncio.run(ledger.write())
        used = ledger.sum_tokens(day, "k")
        ledger.close()
        return used

    assert [use(DAY), use(DAY + 5000), use(DAY)] == [1, 1, 2]


def test_days_beyond_those_that_are_kept_go(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as file, file:
        rows = [(day, "k", model) for day in range(1, ledger_module.KEPT_DAYS + 3) for model in "ab"]
        file.executemany("INSERT INTO usage VALUES (?, ?, ?, 1, 1, 1, 0)", rows)
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT min(day), count(*) FROM usage").fetchone() == (3, 2 * ledger_module.KEPT_DAYS)


def test_write_that_fails_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ledger_module, "BUSY_S", 0.01)
    ledger = Ledger(tmp_path / "u.sqlite", lambda: DAY * DAY_S)
    with closing(sqlite3.connect(tmp_path / "u.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            ledger.find_row(DAY, "k", "m").add(Tally(1, 1, 1, 1))
            write(ledger)
        other.execute("ROLLBACK")
    ledger.find_row(DAY, "k", "m").add(Tally(1, 1, 1, 1))
    write(ledger)
    assert read_file(tmp_path / "u.sqlite") == [("k", "m", 3, 3, 3, 3)]
    messages = [record.getMessage() for record in caplog.records if "usage_file" in record.getMessage()]
    assert len(messages) == 2
    assert "database is locked; it is tried again" in messages[0]
    assert messages[1].endswith("written again")


def test_disk_that_is_full_is_a_line_and_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "u.sqlite", lambda: DAY * DAY_S)
    assert ledger._file is not None
    (pages,) = ledger._file.execute("PRAGMA page_count").fetchone()
    ledger._file.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(500):
        ledger.find_row(DAY, f"key-{number}", "m" * 100).add(Tally(1))
    write(ledger)
    assert "database or disk is full; it is tried again" in caplog.text
    assert read_file(tmp_path / "u.sqlite") == []
    ledger._file.execute("PRAGMA max_page_count = 1000000")
    write(ledger)
    assert len(read_file(tmp_path / "u.sqlite")) == 500


def test_what_is_no_file_of_usage_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    path.write_text(json.dumps({"some": "thing else"}) * 100)
    model = {"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}
    with pytest.raises(EngineError, match=r"usage_file .*: expected a file of usage .*, got file is not a database"):
        create_app(parse_config({"models": [model], "access": {"usage_file": str(path)}}, "test"))
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as other:
        other.execute("CREATE TABLE usage (a)")
        other.commit()
    with pytest.raises(EngineError, match="no such column"):
        Ledger(tmp_path / "other.sqlite")
    Ledger(broken := tmp_path / "broken.sqlite").close()
    data = bytearray(broken.read_bytes())
    data[4096:] = b"x" * len(data[4096:])  # behind the page that says what is in it
    broken.write_bytes(data)
    with pytest.raises(EngineError, match=r"expected a file of usage .*, got database disk image is malformed"):
        Ledger(broken)
    with pytest.raises(ValueError, match=r"access: usage_file: expected a file in a folder that exists"):
        parse_config({"models": [model], "access": {"usage_file": "/nowhere/u.sqlite"}}, "test")
