"""The gateway on upstreams that behave and that do not: bytes, routing, limits, faults, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from gateway_fakes import SSE, Exchange, Upstream, gateway, make_request, read_headers, read_reply, wait_until
from prometheus_client.parser import text_string_to_metric_families

from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.engines.pool import Pool

BODY = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
COMPLETIONS = "/v1/completions"
# A two-byte character and an event cut in the middle: what ends in a blank line is handed on.
PIECES = [b'data: {"t": "caf', b"\xc3", b'\xa9"}\n', b"\ndata: ", b"{}\n\n", b": keep-alive\n\n", b"data: [DONE]\n\n"]
EVENTS = [b'data: {"t": "caf\xc3\xa9"}\n\n', b"data: {}\n\n", b": keep-alive\n\n", b"data: [DONE]\n\n"]


async def stream(exchange: Exchange) -> None:
    await exchange.start(SSE)
    for piece in PIECES:
        await exchange.chunk(piece)
        await asyncio.sleep(0.005)  # or the kernel joins them
    await exchange.end()


async def hold(exchange: Exchange) -> None:
    """One chunk, then nothing."""
    await exchange.start(SSE)
    await exchange.chunk(b"data: {}\n\n")
    await asyncio.sleep(60)


async def die_in_an_event(exchange: Exchange) -> None:
    await exchange.start(SSE)
    await exchange.chunk(b'data: {"whole": 1}\n\ndata: {"half')
    await asyncio.sleep(0.02)
    exchange.abort()


async def reset_at_once(exchange: Exchange) -> None:
    exchange.abort()


def slow(delay_s: float) -> object:
    async def answer(exchange: Exchange) -> None:
        await asyncio.sleep(delay_s)
        await exchange.answer(b"{}")

    return answer


def test_stream_passes_byte_for_byte_and_event_by_event() -> None:
    with Upstream({COMPLETIONS: stream}) as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, BODY)
        assert reply.status == 200
        assert reply.chunks == EVENTS
        assert reply.header("content-type") == "text/event-stream"
        front.wait_idle()


def test_request_passes_as_it_is() -> None:
    body = '{"model": "m",  "unknown_vendor_field": [1, {"é": null}], "n": 2}'.encode()
    headers = "x-request-id: abc\r\ntraceparent: 00-1-2-03\r\nauthorization: Bearer k\r\naccept-encoding: gzip\r\n"
    headers += "connection: keep-alive, x-private\r\nx-private: 1\r\n"
    with Upstream() as engine, gateway(engine) as front:
        seen = front.ask("/v1/made%20up/path?a=%2F&b=1", body, headers).json()
        assert seen["line"] == "POST /v1/made%20up/path?a=%2F&b=1 HTTP/1.1"
        assert seen["body"].encode("latin-1") == body
        found = dict(seen["headers"])
        for name, value in (("x-request-id", "abc"), ("traceparent", "00-1-2-03"), ("accept-encoding", "gzip")):
            assert found[name] == value
        assert found["authorization"] == "Bearer k"
        assert "x-private" not in found
        assert found["host"] == engine.url.removeprefix("http://")
        assert found["content-length"] == str(len(body))
        assert "user-agent" not in found


def test_request_id_goes_in_and_comes_out() -> None:
    with Upstream() as engine, gateway(engine) as front:
        reply = front.ask("/v1/x", headers="x-request-id: mine-1\r\n")
        assert reply.header("x-request-id") == "mine-1"
        assert dict(reply.json()["headers"])["x-request-id"] == "mine-1"
        made = front.ask("/v1/x", headers="x-request-id: no spaces allowed\r\n")
        assert made.header("x-request-id") == dict(made.json()["headers"])["x-request-id"]
        assert len(made.header("x-request-id") or "") == 32
        refused = front.ask(COMPLETIONS, b'{"model": "none"}', "x-request-id: mine-2\r\n")
        assert refused.header("x-request-id") == "mine-2"


def test_answer_passes_as_it_is() -> None:
    async def odd(exchange: Exchange) -> None:
        headers = "content-type: application/json\r\nx-custom: é\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
        await exchange.answer(b'{"error": {"message": "no"}}', headers.encode("latin-1").decode("latin-1"), "422 Odd")

    with Upstream({COMPLETIONS: odd}) as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, BODY)
        assert (reply.status, reply.body) == (422, b'{"error": {"message": "no"}}')
        assert [v for k, v in reply.headers if k == "set-cookie"] == ["a=1", "b=2"]
        assert reply.header("x-upstream") == "a"


def test_compressed_answer_and_redirect_are_not_touched() -> None:
    async def squeezed(exchange: Exchange) -> None:
        await exchange.answer(b"\x1f\x8bnot really", "content-encoding: gzip\r\n")

    async def elsewhere(exchange: Exchange) -> None:
        await exchange.answer(b"", "location: http://example.invalid/\r\n", "307 Temporary Redirect")

    with Upstream({"/v1/a": squeezed, "/v1/b": elsewhere}) as engine, gateway(engine) as front:
        assert front.ask("/v1/a").body == b"\x1f\x8bnot really"
        assert front.ask("/v1/b").status == 307


def test_unknown_model_is_refused_in_openais_form() -> None:
    with Upstream() as engine, gateway(engine, others=["n"]) as front:
        reply = front.ask(COMPLETIONS, b'{"model": "http://169.254.169.254/"}')
        assert reply.status == 404
        assert reply.json() == {
            "error": {
                "message": "The model `http://169.254.169.254/` does not exist.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        }
        assert not any(exchange.line.startswith("POST") for exchange in engine.seen)


def test_body_that_is_no_json_is_the_engines_to_refuse() -> None:
    with Upstream() as engine, gateway(engine) as front:
        assert front.ask(COMPLETIONS, b"\xff{").json()["body"] == "\xff{"


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/%2e%2e/admin", "/v1%2fmodels", "//v1/models", "/v1/..%5cx"])
def test_path_that_could_leave_the_engines_root_is_refused(path: str) -> None:
    with Upstream() as engine, gateway(engine) as front:
        assert front.ask(path).status == 400
        assert engine.seen == []


def test_load_goes_where_there_is_least() -> None:
    with Upstream({COMPLETIONS: hold}) as one, Upstream({COMPLETIONS: hold}) as two, gateway(one, two) as front:
        connections = [front.connect() for _ in range(6)]
        for connection in connections:
            connection.sendall(make_request(COMPLETIONS, BODY))
            time.sleep(0.02)
        wait_until(lambda: len(one.seen) + len(two.seen) == 6)
        assert len(one.seen) == len(two.seen) == 3
        for connection in connections:
            connection.close()
        front.wait_idle()


def test_session_stays_on_one_engine() -> None:
    with Upstream() as one, Upstream() as two, gateway(one, two, model={"affinity": "session"}) as front:
        for session in range(8):
            ups = {front.ask(COMPLETIONS, BODY, f"x-session-id: s{session}\r\n").header("x-upstream") for _ in range(3)}
            assert len(ups) == 1
        assert one.seen
        assert two.seen


def choose_many(weights: list[float], affinity: bool) -> list[float]:
    """How often each upstream is chosen, 3000 requests one after the other."""
    upstreams = [{"name": f"u{i}", "url": f"http://h:{i + 1}", "weight": w} for i, w in enumerate(weights)]
    config = parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")
    pool = Pool(config.models[0], config.limits)
    pool.configure(config.models[0], config.limits)

    async def run() -> None:
        for i in range(3000):
            pool.release(await pool.acquire(b"session %d" % i if affinity else None))

    asyncio.run(run())
    return [engine.turns for engine in pool.engines]


@pytest.mark.parametrize("affinity", [False, True])
def test_engines_get_shares_by_weight(affinity: bool) -> None:
    shares = choose_many([9.0, 1.0], affinity)
    assert shares[0] / 3000 == pytest.approx(0.9, abs=0.02)
    assert choose_many([1.0, 1.0, 1.0], affinity) == pytest.approx([1000] * 3, abs=80)


def test_engine_that_was_away_does_not_get_what_it_missed() -> None:
    upstreams = [{"name": name, "url": "http://h:1"} for name in "ab"]
    config = parse_config({"models": [{"name": "m", "upstreams": upstreams}]}, "test")
    pool = Pool(config.models[0], config.limits)
    pool.configure(config.models[0], config.limits)
    one, two = pool.engines

    async def run() -> None:
        two.healthy = False
        for _ in range(100):
            pool.release(await pool.acquire(None))
        two.healthy = True
        pool.welcome(two)
        before = one.turns
        for _ in range(100):
            pool.release(await pool.acquire(None))
        assert one.turns - before == pytest.approx(50, abs=1)

    asyncio.run(run())


def test_key_stands_in_for_a_session() -> None:
    names = [f"k{i}" for i in range(6)]
    keys = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in names]
    with (
        Upstream() as one,
        Upstream() as two,
        gateway(one, two, keys=keys, model={"affinity": "session"}) as front,
    ):
        for name in names:
            ups = {front.ask(COMPLETIONS, BODY, f"x-api-key: {name}\r\n").header("x-upstream") for _ in range(3)}
            assert len(ups) == 1
        assert one.seen
        assert two.seen


@pytest.mark.slow
def test_queue_holds_the_rest_and_refuses_what_is_too_much() -> None:
    limits = {"max_queued": 2, "queue_timeout_s": 5.0}
    with (
        Upstream({COMPLETIONS: slow(0.3)}) as engine,  # type: ignore[dict-item]
        gateway(engine, limits=limits, upstream={"max_in_flight": 1}) as front,
        ThreadPoolExecutor(4) as pool,
    ):
        sent = []
        for _ in range(4):
            sent.append(pool.submit(front.ask, COMPLETIONS, BODY))
            time.sleep(0.05)
        replies = [future.result() for future in sent]
        assert [reply.status for reply in replies] == [200, 200, 200, 429]
        assert replies[3].header("retry-after") == "1"
        front.wait_idle()


def test_engine_that_comes_back_takes_all_who_wait() -> None:
    with (
        Upstream({COMPLETIONS: slow(0.2)}) as engine,  # type: ignore[dict-item]
        gateway(engine, upstream={"max_in_flight": 8}) as front,
        ThreadPoolExecutor(8) as pool,
    ):
        state = front.relay.pools["m"].engines[0]
        state.in_flight = 8  # full, by requests that never end
        sent = [pool.submit(front.ask, COMPLETIONS, BODY) for _ in range(8)]
        wait_until(lambda: front.relay.pools["m"].queued == 8)
        started = time.monotonic()
        state.in_flight = 0
        front.loop.call_soon_threadsafe(front.relay.pools["m"].wake)
        assert all(future.result().status == 200 for future in sent)
        assert time.monotonic() - started < 8 * 0.2 / 2, "together, not one after the other"


def test_waiting_too_long_for_a_slot_is_408() -> None:
    with (
        Upstream({COMPLETIONS: hold}) as engine,
        gateway(engine, limits={"queue_timeout_s": 0.1}, upstream={"max_in_flight": 1}) as front,
        front.connect() as holder,
    ):
        holder.sendall(make_request(COMPLETIONS, BODY))
        wait_until(lambda: len(engine.seen) == 1)
        assert front.ask(COMPLETIONS, BODY).status == 408


def test_client_that_waits_and_leaves_gives_its_place_back() -> None:
    with (
        Upstream({COMPLETIONS: hold}) as engine,
        gateway(engine, upstream={"max_in_flight": 1}) as front,
        front.connect() as holder,
    ):
        holder.sendall(make_request(COMPLETIONS, BODY))
        wait_until(lambda: len(engine.seen) == 1)
        with front.connect() as waiter:
            waiter.sendall(make_request(COMPLETIONS, BODY))
            wait_until(lambda: front.relay.pools["m"].queued == 1)
        wait_until(lambda: front.relay.pools["m"].queued == 0)
        assert len(engine.seen) == 1


def test_client_that_leaves_aborts_the_engine_within_100_ms() -> None:
    with Upstream({COMPLETIONS: hold}) as engine, gateway(engine) as front:
        with front.connect() as connection:
            connection.sendall(make_request(COMPLETIONS, BODY))
            assert connection.recv(1)
            left = time.monotonic()
        wait_until(lambda: bool(engine.gone))
        assert engine.gone[0] - left < 0.1
        front.wait_idle()


def test_client_that_closes_its_sending_half_counts_as_gone() -> None:
    """A closed connection looks the same until something is written, and an answer for nobody takes a slot."""
    with Upstream({COMPLETIONS: hold}) as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request(COMPLETIONS, BODY))
        assert connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(engine.gone))
        front.wait_idle()


def test_engine_that_dies_in_an_event_ends_in_a_well_formed_error() -> None:
    with Upstream({COMPLETIONS: die_in_an_event}) as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, BODY)
        assert not reply.cut
        events = reply.body.split(b"\n\n")
        assert events[0] == b'data: {"whole": 1}'
        assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "server_error"
        assert events[2] == b"data: [DONE]"
        assert len(engine.seen) == 1, "a stream that began is never sent again"
        front.wait_idle()


def test_messages_stream_ends_in_anthropics_form() -> None:
    with Upstream({"/v1/messages": die_in_an_event}) as engine, gateway(engine) as front:
        body = front.ask("/v1/messages", BODY).body
        assert b"\n\nevent: error\ndata: " in body
        assert json.loads(body.split(b"data: ")[-1])["type"] == "error"


def test_engine_that_falls_silent_ends_in_an_error() -> None:
    with Upstream({COMPLETIONS: hold}) as engine, gateway(engine, limits={"read_timeout_s": 0.2}) as front:
        assert b"sent nothing for too long" in front.ask(COMPLETIONS, BODY).body
        assert len(engine.seen) == 1
        front.wait_idle()


def test_engine_that_never_answers_is_504() -> None:
    never = slow(60)
    with (
        Upstream({COMPLETIONS: never}) as engine,  # type: ignore[dict-item]
        gateway(engine, limits={"first_byte_timeout_s": 0.2}) as front,
    ):
        assert front.ask(COMPLETIONS, BODY).status == 504
        assert len(engine.seen) == 1, "it may have begun: never sent again"


def test_engine_that_resets_is_502_and_not_tried_again() -> None:
    with Upstream({COMPLETIONS: reset_at_once}) as engine, Upstream() as other, gateway(engine, other) as front:
        front.relay.pools["m"].engines[1].in_flight = 50  # so that the first one is chosen
        assert front.ask(COMPLETIONS, BODY).status == 502
        front.relay.pools["m"].engines[1].in_flight = 0
        assert (len(engine.seen), len(other.seen)) == (1, 0)


def test_body_with_a_length_that_is_cut_short_is_cut_for_the_client_too() -> None:
    async def short(exchange: Exchange) -> None:
        await exchange.start("content-type: application/json\r\ncontent-length: 100\r\n")
        exchange.writer.write(b'{"half": ')
        await exchange.writer.drain()
        await asyncio.sleep(0.02)
        exchange.abort()

    with Upstream({COMPLETIONS: short}) as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, BODY)
        assert reply.cut
        assert reply.body == b'{"half": '
        front.wait_idle()


def test_engine_that_cannot_be_reached_is_passed_over() -> None:
    with Upstream() as engine:
        dead = Upstream(url="http://127.0.0.1:9")
        with gateway(dead, engine) as front:
            front.relay.pools["m"].engines[0].healthy = True  # as it was a moment ago
            assert front.ask(COMPLETIONS, BODY).header("x-upstream") == "b"
            front.wait_idle()


def test_no_healthy_engine_is_503_and_readiness_says_so() -> None:
    with Upstream(healthy=False) as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, BODY)
        assert (reply.status, reply.header("retry-after")) == (503, "1")
        assert front.ask("/ready").status == 503
        assert front.ask("/health").status == 200


def test_keys_are_needed_where_there_are_some() -> None:
    keys = [{"name": "one", "sha256": hashlib.sha256(b"secret").hexdigest(), "max_in_flight": 1}]
    with Upstream({COMPLETIONS: hold}) as engine, gateway(engine, keys=keys) as front:
        assert front.ask("/v1/models").status == 401
        assert front.ask("/v1/models", headers="authorization: Bearer wrong\r\n").status == 401
        assert front.ask("/v1/models", headers="authorization: bearer secret\r\n").status == 200
        seen = front.ask("/v1/models", headers="x-api-key: secret\r\n")
        assert seen.status == 200
        assert "secret" not in seen.body.decode(), "the key was for the gateway"
        assert front.ask("/health").status == 200
        with front.connect() as connection:
            connection.sendall(make_request(COMPLETIONS, BODY, "x-api-key: secret\r\n"))
            wait_until(lambda: len(engine.seen) == 3)
            assert front.ask("/v1/models", headers="x-api-key: secret\r\n").status == 429
        front.wait_idle()


def test_body_that_is_too_large_is_413() -> None:
    with Upstream() as engine, gateway(engine, server={"max_body_bytes": 2048}) as front:
        assert front.ask(COMPLETIONS, b"x" * 3000).status == 413
        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        with front.connect() as connection:
            connection.sendall(chunked + b"bb8\r\n" + b"x" * 3000 + b"\r\n0\r\n\r\n")
            assert read_reply(connection).status == 413
        assert engine.seen == []


def test_compressed_body_is_415() -> None:
    with Upstream() as engine, gateway(engine) as front:
        reply = front.ask(COMPLETIONS, gzip.compress(BODY), "content-encoding: gzip\r\n")
        assert (reply.status, reply.json()["error"]["code"]) == (415, "unsupported_encoding")
        assert "uncompressed" in front.ask("/v1/messages", b"x", "Content-Encoding: BR\r\n").json()["error"]["message"]
        assert front.ask(COMPLETIONS, BODY, "content-encoding: identity\r\n").status == 200
        assert [exchange.body for exchange in engine.seen] == [BODY]


def test_body_that_does_not_come_is_408() -> None:
    with Upstream() as engine, gateway(engine, server={"body_timeout_s": 0.1}) as front, front.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        assert read_reply(connection).status == 408
        assert engine.seen == []


def test_head_that_does_not_come_ends_the_connection() -> None:
    with Upstream() as engine, gateway(engine, server={"header_timeout_s": 0.2}) as front:
        for sent in (b"", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ", make_request("/v1/x") + b"GET /v1/y HT"):
            with front.connect() as connection:
                connection.sendall(sent)
                if sent.endswith(b"HT"):
                    assert read_reply(connection).status == 200
                started = time.monotonic()
                assert b"408" in connection.recv(4096)
                assert connection.recv(4096) == b""
                assert time.monotonic() - started < 2


def test_streams_outlive_the_heads_time_limit() -> None:
    with (
        Upstream({COMPLETIONS: slow(0.5)}) as engine,  # type: ignore[dict-item]
        gateway(engine, server={"header_timeout_s": 0.2}) as front,
    ):
        assert front.ask(COMPLETIONS, BODY).status == 200


def test_head_without_end_is_431() -> None:
    with Upstream() as engine, gateway(engine, server={"max_head_bytes": 2048}) as front:
        assert front.ask("/v1/x", headers=f"x-long: {'a' * 1500}\r\n").status == 200
        with front.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-more: aaaaaaaaaaaaaaaa\r\n" * 200)
            assert read_reply(connection).status == 431


def test_upgrade_to_a_websocket_is_not_taken() -> None:
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n"
    with Upstream() as engine, gateway(engine) as front:
        assert front.ask("/v1/realtime", headers=upgrade).status in (200, 400)
        assert all(name != "upgrade" for exchange in engine.seen for name, _ in read_headers(exchange.head))


def test_smuggled_request_is_refused() -> None:
    both = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
    both += b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
    with Upstream() as engine, gateway(engine) as front:
        with front.connect() as connection:
            connection.sendall(both)
            assert read_reply(connection).status == 400
        assert engine.seen == []


def test_metrics_tell_what_happened() -> None:
    with Upstream({COMPLETIONS: stream}) as engine, gateway(engine) as front:
        front.ask(COMPLETIONS, BODY)
        front.ask("/v1/scan/me")
        front.wait_idle()
        text = front.ask("/metrics").body.decode()
        assert 'laguna_gateway_requests_total{path="/v1/completions",status="200"} 1.0' in text
        assert 'laguna_gateway_requests_total{path="other",status="200"} 1.0' in text
        assert 'laguna_gateway_ttft_seconds_count{model="m",upstream="a"} 2.0' in text
        assert 'laguna_gateway_upstream_up{model="m",upstream="a"} 1.0' in text


METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
# HELP vllm:spec_decode_num_accepted_tokens_total Accepted.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 250.0
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 9.0
# HELP bare A sample without labels.
# TYPE bare gauge
bare 3.0
"""


def test_engines_metrics_are_shown_with_their_upstream() -> None:
    async def show(exchange: Exchange) -> None:
        await exchange.answer(METRICS.encode(), "content-type: text/plain\r\n")

    with Upstream({"/metrics": show}) as one, Upstream({"/metrics": show}) as two, gateway(one, two) as front:
        text = front.ask("/metrics").body.decode()
        assert 'vllm:spec_decode_num_drafts_total{upstream="a",engine="0",model_name="m"} 100.0' in text
        assert 'bare{upstream="b"} 3.0' in text
        assert 'laguna_gateway_acceptance_length{model="m",upstream="a"} 3.5' in text
        families = [family.name for family in text_string_to_metric_families(text)]
        assert len(families) == len(set(families)), "a family stays together"
        assert {"laguna_gateway_requests", "laguna_gateway_process_max_fds", "process_open_fds"} <= set(families)


def test_engine_without_metrics_leaves_the_gateways_own() -> None:
    with Upstream({"/metrics": reset_at_once}) as engine, gateway(engine) as front:
        assert "laguna_gateway_upstream_up" in front.ask("/metrics").body.decode()


def test_access_log_tells_who_and_where_and_never_what() -> None:
    keys = [{"name": "agents", "sha256": hashlib.sha256(b"secret").hexdigest()}]
    body = json.dumps({"model": "m", "prompt": "private words"}).encode()
    with Upstream() as engine, gateway(engine, keys=keys) as front:
        front.ask(f"{COMPLETIONS}?q=private", body, "x-api-key: secret\r\nx-request-id: r1\r\n")
        front.ask("/v1/models%1b[31m")
        wait_until(lambda: front.log.getvalue().count("\n") == 2)
        text = front.log.getvalue()
        assert "secret" not in text
        assert "private" not in text
        assert "\x1b" not in text
        first, second = map(json.loads, text.splitlines())
        told = {name: first[name] for name in ("request_id", "method", "path", "key", "model", "upstream", "status")}
        assert told == {
            "request_id": "r1",
            "method": "POST",
            "path": COMPLETIONS,
            "key": "agents",
            "model": "m",
            "upstream": "a",
            "status": 200,
        }
        assert 0 < first["ttft_ms"] <= first["total_ms"]
        assert (second["status"], second["upstream"]) == (401, None)


@pytest.mark.slow
def test_many_at_once_leave_nothing_behind() -> None:
    with Upstream({COMPLETIONS: stream}) as engine, gateway(engine, upstream={"max_in_flight": 16}) as front:
        with ThreadPoolExecutor(32) as pool:
            replies = list(pool.map(lambda _: front.ask(COMPLETIONS, BODY), range(128)))
        assert all(reply.chunks == EVENTS for reply in replies)
        front.wait_idle()


def test_stop_lets_streams_finish_and_takes_no_more() -> None:
    release = threading.Event()

    async def until_released(exchange: Exchange) -> None:
        await exchange.start(SSE)
        await exchange.chunk(b"data: 1\n\n")
        while not release.is_set():
            await asyncio.sleep(0.01)
        await exchange.chunk(b"data: 2\n\n")
        await exchange.end()

    with Upstream({COMPLETIONS: until_released}) as engine, gateway(engine) as front, front.connect() as kept:
        kept.sendall(make_request("/health"))
        assert read_reply(kept).status == 200
        with ThreadPoolExecutor(1) as pool:
            streaming = pool.submit(front.ask, COMPLETIONS, BODY)
            wait_until(lambda: len(engine.seen) == 1)
            front.server.handle_exit(15, None)
            with contextlib.suppress(ConnectionError):  # it may have been closed before it asked again
                kept.sendall(make_request("/v1/models"))
                assert read_reply(kept).status in (0, 503)
            release.set()
            assert streaming.result(10).chunks == [b"data: 1\n\n", b"data: 2\n\n"]


def test_pipelined_requests_are_answered_in_order() -> None:
    async def late(exchange: Exchange) -> None:
        await asyncio.sleep(0.2)
        await exchange.answer(b'"late"')

    with Upstream({COMPLETIONS: late}) as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request(COMPLETIONS, BODY) + make_request("/v1/models") + make_request("/health"))
        file = connection.makefile("rb")
        found = [read_reply(connection, file) for _ in range(3)]
        assert [reply.status for reply in found] == [200, 200, 200]
        assert found[0].body == b'"late"'
        assert found[1].json()["line"] == "GET /v1/models HTTP/1.1"
        assert found[2].body == b""
        front.wait_idle()


def test_client_of_http_1_0_gets_a_body_that_ends_with_the_connection() -> None:
    with Upstream({COMPLETIONS: stream}) as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request(COMPLETIONS, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == b"".join(PIECES)
        front.wait_idle()


def test_head_has_no_body() -> None:
    with Upstream() as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(make_request("/v1/models", method="HEAD") + make_request("/v1/models"))
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        first = answer.split(b"\r\n\r\n")[1]
        assert first.startswith(b"HTTP/1.1 200 OK"), "the second answer follows the first one's head"
        front.wait_idle()


def test_client_that_asks_first_is_told_to_go_on() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n"
    with Upstream() as engine, gateway(engine) as front, front.connect() as connection:
        connection.sendall(head)
        assert connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"null")
        reply = read_reply(connection)
        assert reply.json()["body"] == "null"
        assert all(name != "expect" for name, _ in reply.json()["headers"])


def test_refusal_reaches_a_client_that_is_still_sending() -> None:
    with Upstream() as engine, gateway(engine, server={"max_body_bytes": 2048}) as front:
        with front.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n")
            connection.sendall(b"x" * 3_000_000)
            reply = read_reply(connection)
            assert reply.status == 413
            assert reply.header("connection") == "close"
        assert engine.seen == []
        front.wait_idle()


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nx-evil: 1", "a\x00b"])
def test_headers_cannot_be_injected(value: str) -> None:
    with Upstream() as engine, gateway(engine) as front:
        reply = front.ask("/v1/models", headers=f"x-request-id: {value}\r\n")
        assert reply.status == 400 or all(name != "x-evil" for name, _ in reply.headers)
        for exchange in engine.seen:
            assert exchange.head.count(b"x-request-id") == 1


def test_all_models_are_listed_where_there_are_several() -> None:
    with Upstream() as engine, gateway(engine, others=["n"]) as front:
        reply = front.ask("/v1/models")
        assert [model["id"] for model in reply.json()["data"]] == ["m", "n"]
        assert reply.json()["object"] == "list"
        assert reply.header("x-request-id")
        assert front.ask("/v1/models", method="HEAD", headers="connection: close\r\n").status == 200


@pytest.mark.parametrize("more", [b"\x00 no request\r\n\r\n", b"GET /" + b"x" * 5000], ids=["garbage", "endless"])
def test_what_follows_a_request_never_stands_in_its_answer(more: bytes) -> None:
    with Upstream({COMPLETIONS: hold}) as engine, gateway(engine, server={"max_head_bytes": 2048}) as front:
        with front.connect() as connection:
            connection.sendall(make_request(COMPLETIONS, BODY))
            wait_until(lambda: len(engine.seen) == 1)
            time.sleep(0.1)
            connection.sendall(more[:10])
            time.sleep(0.1)
            connection.sendall(more[10:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.endswith(b"data: {}\n\n\r\n")
        front.wait_idle()


def test_request_that_trickles_in_behind_a_stream_lets_it_finish() -> None:
    with (
        Upstream({COMPLETIONS: slow(0.6)}) as engine,  # type: ignore[dict-item]
        gateway(engine, server={"header_timeout_s": 0.2}) as front,
        front.connect() as connection,
    ):
        connection.sendall(make_request(COMPLETIONS, BODY))
        time.sleep(0.05)
        connection.sendall(b"GET /v1/models HT")
        file = connection.makefile("rb")
        assert read_reply(connection, file).body == b"{}"
        assert read_reply(connection, file).status == 408
