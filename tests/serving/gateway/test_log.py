"""What operators learn from log, metrics and status page: states of engines, refusals and whose they are."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import re
import time

import pytest
from gateway_fakes import NOBODY, Exchange, Upstream, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.access.holder import Holder
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.telemetry.event_log import BurstLog, set_up_logging
from laguna_serve.serving.gateway.wire import errors

PATH = "/v1/completions"
BODY = b'{"model": "m"}'
DIGEST = hashlib.sha256(b"sk").hexdigest()
KEY = "authorization: Bearer sk\r\n"


async def die(exchange: Exchange) -> None:
    exchange.abort()


def test_every_refusal_has_its_own_reason() -> None:
    arguments = {"message": "m", "model": "m", "method": "GET", "path": "/", "most": 1, "retry_after_s": 1}
    arguments |= {"cause": "c", "state": "s", "given": "g", "policy": "p", "latest": "v", "coding": "gzip"}
    made = []
    for name, maker in inspect.getmembers(errors, inspect.isfunction):
        signature = inspect.signature(maker)
        if signature.return_annotation != "GatewayError":
            continue
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty]
        error = maker(*(arguments[parameter] for parameter in needed))
        assert re.fullmatch(r"[a-z_]+", error.reason), name
        assert error.reason != "other", name
        made.append(error.reason)
    assert len(made) > 10
    assert len(made) == len(set(made))


def test_half_a_character_takes_no_lines_from_the_access_log() -> None:
    with Upstream() as engine, gateway(engine, others=["n"]) as front:
        for body in (BODY, b'{"model": "a\\ud800"}', BODY):
            front.ask(PATH, body)
        wait_until(lambda: front.log.getvalue().count("\n") == 3)
        lines = [json.loads(line) for line in front.log.getvalue().splitlines()]
        assert [line["error"] for line in lines] == [None, "The model `a?` does not exist.", None]
        assert front.ask_admin("/").status == 200


def test_throttled_key_is_named_everywhere() -> None:
    keys = [
        {"name": "often", "sha256": DIGEST, "requests_per_minute": 1},
        {"name": "many", "sha256": hashlib.sha256(b"sk2").hexdigest(), "max_in_flight": 1},
    ]
    release = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await release.wait()
        await exchange.answer(b"{}")

    with Upstream({"/v1/hold": hold}) as engine, gateway(engine, keys=keys) as front:
        assert [front.ask(PATH, BODY, KEY).status for _ in range(2)] == [200, 429]
        with front.connect() as connection:
            connection.sendall(make_request("/v1/hold", BODY, "authorization: Bearer sk2\r\n"))
            wait_until(lambda: any("hold" in exchange.line for exchange in engine.seen))
            reply = front.ask(PATH, BODY, "authorization: Bearer sk2\r\n")
            assert reply.status == 429
            engine._loop.call_soon_threadsafe(release.set)
            assert read_reply(connection).status == 200
        front.wait_idle()
        wait_until(lambda: front.log.getvalue().count('"status":429') == 2)
        lines = [json.loads(line) for line in front.log.getvalue().splitlines()]
        found = {(line["key"], line["reason"], line["error"]) for line in lines if line["status"] == 429}
        assert {(key, reason) for key, reason, _ in found} == {("often", "key_rate"), ("many", "key_in_flight")}
        assert len({message for *_, message in found}) == 2
        text = front.ask("/metrics", headers="authorization: Bearer sk2\r\n").body.decode()
        assert 'laguna_gateway_refusals_total{key="often",reason="key_rate"} 1.0' in text
        assert 'laguna_gateway_refusals_total{key="many",reason="key_in_flight"} 1.0' in text
        status = front.ask_admin("/admin/status").json()
        assert {error["key"] for error in status["last_errors"]} == {"often", "many"}
        assert {key["name"]: key["refused"] for key in status["keys"]} == {"often": 1, "many": 1}
        page = front.ask_admin("/").body.decode()
        assert "often" in page
        assert "key_rate" in page
        assert DIGEST not in page + text + json.dumps(status) + front.log.getvalue()


def test_full_queue_is_another_reason_than_a_keys_limit() -> None:
    async def hold(exchange: Exchange) -> None:
        await asyncio.sleep(60)

    with (
        Upstream({PATH: hold}) as engine,
        gateway(engine, limits={"max_queued": 0}, upstream={"max_in_flight": 1}) as front,
        front.connect() as connection,
    ):
        connection.sendall(make_request(PATH, BODY))
        wait_until(lambda: len(engine.seen) == 1)
        assert front.ask(PATH, BODY).status == 429
        assert front.relay.last_errors[-1]["reason"] == "queue_full"


def test_digests_are_in_no_repr() -> None:
    upstream = {"name": "a", "url": "http://h:1"}
    tables = {"models": [{"name": "m", "upstreams": [upstream]}], "admin": {"sha256": DIGEST}}
    config = parse_config({**tables, "keys": [{"name": "k", "sha256": DIGEST}]}, "test")
    holder = Holder(config.keys[0], Ledger(), time.monotonic, time.time)
    shown = f"{config!r} {config} {config.keys} {config.admin!r} {holder!r}"
    assert DIGEST not in shown
    assert repr(bytes.fromhex(DIGEST)) not in shown


def test_failures_are_logged_without_an_access_log(caplog: pytest.LogCaptureFixture) -> None:
    with Upstream({PATH: die}) as engine, gateway(engine) as front:
        front.ask(f"{PATH}?secret=1", BODY, "x-request-id: lost-1\r\n")
        assert front.ask("/nope", BODY).status == 404
        front.wait_idle()
    (line,) = [record for record in caplog.records if record.name.endswith("journal")]
    assert line.levelno == logging.WARNING
    message = line.getMessage()
    assert message.startswith("502 engine_lost: ")
    for part in ("request lost-1", f"POST {PATH}, ", "model m", "engine a: connection lost"):
        assert part in message
    assert "secret" not in message


def test_engine_that_goes_is_one_line_and_requests_say_why(caplog: pytest.LogCaptureFixture) -> None:
    dead = Upstream(url=NOBODY)
    with gateway(dead) as front:
        assert front.ask(PATH, BODY).status == 503
        front.wait_idle()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name != "asyncio"]
    assert lines[0] == ("WARNING", "engine a lost: /health: connection refused")
    assert lines[1][1].startswith("503 no_engine: ")
    assert len(lines) == 2


def test_outage_under_load_is_a_few_lines_and_a_number(caplog: pytest.LogCaptureFixture) -> None:
    with gateway(Upstream(url=NOBODY)) as front:
        with front.connect() as connection:
            file = connection.makefile("rb")
            for _ in range(200):
                connection.sendall(make_request(PATH, BODY))
                assert read_reply(connection, file).status == 503
        front.wait_idle()
    lines = [record.getMessage() for record in caplog.records if "503" in record.getMessage()]
    assert len(lines) == 6
    assert lines[-1] == "503 no_engine: 195 more in 10 s"


def test_lines_come_in_full_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        log = BurstLog(logging.getLogger("laguna_serve.test"), window_s=0.05)
        for _ in range(7):
            log.write("kind", "line")
        while "kind: 2 more in 0.05 s" not in caplog.messages:
            await asyncio.sleep(0.01)
        log.write("kind", "again")
        log.flush()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert caplog.messages == ["line"] * 5 + ["kind: 2 more in 0.05 s", "again"]


def test_lines_have_time_and_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever was set up in this process before: for another stderr.
    monkeypatch.setattr(logging.getLogger("laguna_serve"), "handlers", [])
    set_up_logging()
    set_up_logging()
    logging.getLogger("laguna_serve.serving.gateway.engines.engine").info("engine a back")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO gateway: engine a back\n", line)
