"""The admin port: weights for all engines of a model or for none, what answers say of them, status and its page."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_engine import FINISH, VERSION, RlEngine
from gateway_fakes import SSE, Exchange, Gateway, Reply, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.admin import status as status_page

PATH = "/v1/completions"
BODY = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()


def update(front: Gateway, **body: Any) -> tuple[int, dict[str, Any]]:
    reply = front.ask_admin("/admin/update_weights", {"weight_version": "7", "update": [{"names": ["w"]}], **body})
    return reply.status, reply.json()


@pytest.mark.slow
def test_update_reaches_all_and_answers_say_so() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        assert front.ask(PATH, BODY).header("x-weight-version") == "default"
        status, report = update(front, draft_version="d1", draft_update=[{"names": ["d"]}], mode="wait")
        assert (status, report["outcome"]) == (200, "updated")
        reset = "/reset_prefix_cache?reset_running_requests=true"
        expected = ["/pause?mode=wait", "/start_weight_update", "/update_weights", FINISH, reset]
        expected += ["/start_draft_weight_update", "/update_weights", FINISH, reset, "/resume"]
        assert one.calls == two.calls == expected
        assert one.loaded == two.loaded == [{"names": ["w"]}, {"names": ["d"]}]
        for _ in range(2):
            reply = front.ask(PATH, BODY)
            assert (reply.header("x-weight-version"), reply.header("x-draft-version")) == ("7", "d1")


def test_engine_that_does_not_pause_leaves_all_as_they_were() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        two.fail = {"/pause"}
        status, report = update(front)
        assert (status, report["outcome"]) == (502, "unchanged")
        assert "b: HTTP 500" in report["error"]
        assert one.loaded == two.loaded == []
        assert not one.paused
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(2)} == {"a", "b"}


def test_engine_whose_answer_to_a_pause_was_lost_goes_on() -> None:
    async def lose(exchange: Exchange) -> None:
        two.take("/pause", {})
        exchange.abort()

    with RlEngine() as one, RlEngine() as two, gateway(one, two, health={"interval_s": 0.05}) as front:
        two.handlers["/pause"] = lose
        for _ in range(2):
            assert update(front)[1]["outcome"] == "unchanged"
            assert (one.paused, two.paused) == (False, False)
            assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(2)} == {"a", "b"}
        two.fail = {"/resume"}
        assert update(front)[1]["outcome"] == "unchanged"
        engine = front.relay.pools["m"].engines[1]
        assert "paused" in engine.fenced
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(4)} == {"a"}
        two.fail.clear()
        two.take("/resume", {})
        wait_until(lambda: engine.fenced is None)


def test_engine_without_a_route_to_pause_is_asked_no_more_and_serves() -> None:
    with RlEngine() as one, gateway(one, health={"interval_s": 300}) as front:
        one.handlers["/pause"] = one.handlers["/resume"] = one.refuse
        assert update(front)[1]["outcome"] == "unchanged"
        assert front.ask(PATH, BODY).status == 200


def test_engine_in_the_middle_of_an_update_is_fenced_off_when_it_goes_on_by_itself() -> None:
    with RlEngine() as one, gateway(one, health={"interval_s": 0.05}) as front:
        one.fail = {"/update_weights", "/resume"}
        assert update(front)[1]["outcome"] == "unavailable"
        for _ in range(2):  # it is asked whether it is paused, and is, and then is not
            checked = len(one.checks)
            wait_until(lambda seen=checked: len(one.checks) >= seen + 4)  # type: ignore[misc]
            assert "half-way" in front.relay.pools["m"].engines[0].fenced
            one.calls.append("/resume")


@pytest.mark.parametrize("where", ["/start_weight_update", "/update_weights", FINISH])
def test_failed_update_without_a_way_back_serves_nothing(where: str) -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        two.fail = {where}
        status, report = update(front)
        assert (status, report["outcome"]) == (502, "unavailable")
        assert front.ask(PATH, BODY).status == 503
        assert front.ask("/ready").status == 503
        two.fail = set()
        status, report = update(front)
        assert (status, report["outcome"]) == (200, "updated")
        assert front.ask(PATH, BODY).header("x-weight-version") == "7"
        assert not one.paused
        assert not two.paused


def test_failed_update_is_rolled_back() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        update(front)
        one.loaded.clear()
        two.claims = "broken"  # it says that it is done, and is not
        back = {"update": [{"names": ["old"]}]}
        status, report = update(front, weight_version="8", rollback=back)
        assert (status, report["outcome"]) == (502, "reduced")
        assert report["upstreams"]["a"] == {"weight_version": "7", "draft_version": "default", "fenced": None}
        assert "half-way" in report["upstreams"]["b"]["fenced"]
        assert one.loaded == [{"names": ["w"]}, {"names": ["old"]}]
        assert one.version == "7"
        for _ in range(3):
            reply = front.ask(PATH, BODY)
            assert (reply.header("x-upstream"), reply.header("x-weight-version")) == ("a", "7")
        two.claims = None
        assert update(front, weight_version="9")[1]["outcome"] == "updated"
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(2)} == {"a", "b"}


@pytest.mark.parametrize("where", ["/start_weight_update", "/update_weights", FINISH, "/start_draft_weight_update"])
def test_all_that_can_be_rolled_back_is(where: str) -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        one.fail_once = {where}
        back = {"update": [{"names": ["old"]}], "draft_update": [{"names": ["old d"]}]}
        status, report = update(front, draft_update=[{"names": ["d"]}], rollback=back)
        assert (status, report["outcome"]) == (502, "rolled_back")
        assert one.version == two.version == "default"
        assert one.loaded[-2:] == two.loaded[-2:] == [{"names": ["old"]}, {"names": ["old d"]}]
        assert front.ask(PATH, BODY).header("x-weight-version") == "default"


def test_way_back_without_the_drafter_is_none_for_a_drafter() -> None:
    with RlEngine() as one, gateway(one) as front:
        one.fail_once = {"/start_draft_weight_update"}
        back = {"update": [{"names": ["old"]}]}
        assert update(front, draft_update=[{"names": ["d"]}], rollback=back)[1]["outcome"] == "unavailable"


def test_drafter_that_failed_half_way_is_not_forgotten() -> None:
    with RlEngine() as one, gateway(one) as front:
        draft = {"draft_update": [{"names": ["d"]}]}
        one.fail = {FINISH}
        assert update(front, weight_version=None, update=[], **draft)[1]["outcome"] == "unavailable"
        one.fail = set()
        status, report = update(front)
        assert (status, report["outcome"]) == (502, "unchanged")
        assert "expected draft_update, as engines are fenced off" in report["error"]
        for path, body in (("/pause", {}), ("/start_weight_update", {}), (FINISH, {"weight_version": "8"})):
            assert front.ask_admin(path, body).status == 200
        front.ask_admin("/resume", {})
        assert front.ask(PATH, BODY).status == 503
        assert update(front, weight_version=None, update=[], **draft)[1]["outcome"] == "updated"
        assert front.ask(PATH, BODY).status == 200


def test_steps_one_by_one_put_a_failed_update_to_rights() -> None:
    with RlEngine() as one, gateway(one) as front:
        one.claims = "broken"
        assert update(front)[1]["outcome"] == "unavailable"
        one.claims = None
        steps = [("/pause", {}), ("/start_weight_update", {}), ("/update_weights", {"update_info": {"names": ["w"]}})]
        for path, body in (*steps, (FINISH, {"weight_version": "8"}), ("/resume", {})):
            assert front.ask_admin(path, body).status == 200
        reply = front.ask(PATH, BODY)
        assert (reply.status, reply.header("x-weight-version")) == (200, "8")


def test_engine_that_was_left_paused_gets_nothing_until_it_goes_on() -> None:
    """As one whose gateway was killed in the middle of an update."""
    with RlEngine() as one, RlEngine() as two:
        one.calls, two.calls = ["/pause", "/start_weight_update"], ["/pause"]
        with gateway(one, two, health={"interval_s": 0.05}) as front:
            wait_until(lambda: all(engine.fenced for engine in front.relay.pools["m"].engines))
            assert "an update was broken off" in front.ask_admin("/admin/status").body.decode()
            assert front.ask(PATH, BODY).status == 503
            two.calls.append("/resume")
            wait_until(lambda: front.ask(PATH, BODY).status == 200)
            assert front.relay.pools["m"].engines[0].fenced
            assert update(front)[1]["outcome"] == "updated"
            assert front.relay.pools["m"].engines[0].fenced is None
            assert (one.paused, two.paused) == (False, False)


def test_version_alone_is_rolled_back() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        two.fail = {"/update_weight_version"}
        status, report = update(front, update=[], rollback={})
        assert (status, report["outcome"]) == (502, "reduced")
        assert (one.version, report["upstreams"]["a"]["fenced"]) == ("default", None)
        two.fail = set()
        assert update(front, update=[])[1]["outcome"] == "updated"
        assert one.version == two.version == "7"


def test_engine_that_cannot_tell_its_version_is_left_alone() -> None:
    with RlEngine() as one, gateway(one) as front:
        one.handlers[VERSION] = one.refuse  # as before vLLM 0.29
        status, report = update(front)
        assert (status, report["outcome"]) == (502, "unchanged")
        assert "/weight_info: a: HTTP 404" in report["error"]
        assert one.calls == []
        assert front.ask(PATH, BODY).status == 200
        assert update(front, weight_version=None)[1]["outcome"] == "updated"


def test_requests_wait_while_weights_change() -> None:
    with RlEngine() as one, gateway(one) as front, ThreadPoolExecutor(1) as pool:
        assert front.ask_admin("/pause?mode=keep", {}).status == 200
        waiting = pool.submit(front.ask, PATH, BODY)
        wait_until(lambda: front.relay.pools["m"].queued == 1)
        for path, body in (
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"names": ["w"]}}),
            (FINISH, {"weight_version": "2"}),
        ):
            assert front.ask_admin(path, body).status == 200
        assert not waiting.done()
        assert front.ask_admin("/resume", {}).status == 200
        assert waiting.result(5).header("x-weight-version") == "2"


def test_step_that_fails_is_told_and_fences() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        front.ask_admin("/pause", {})
        two.fail = {"/update_weights"}
        front.ask_admin("/start_weight_update", {})
        reply = front.ask_admin("/update_weights", {"update_info": {}})
        assert reply.status == 502
        assert "HTTP 500" in reply.json()["upstreams"]["b"]
        front.ask_admin("/resume", {})
        assert front.ask(PATH, BODY).status == 503


def test_step_without_an_update_under_way_is_refused_and_touches_nothing() -> None:
    """As a client sends that repeats its last request, or comes after an update has ended."""
    steps = [("/update_weights", {"update_info": {"names": ["w"]}}), (FINISH, {"weight_version": "9"}), (FINISH, {})]
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:

        def refuse_all() -> None:
            before = (list(one.calls), list(two.calls))
            for path, body in steps:
                reply = front.ask_admin(path, body)
                assert reply.status == 409
                assert "expected an update under way, got none" in reply.json()["error"]["message"]
            assert (one.calls, two.calls) == before
            assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(2)} == {"a", "b"}

        refuse_all()
        for path, body in (("/pause", {}), ("/start_weight_update", {}), steps[0], (FINISH, {}), ("/resume", {})):
            assert front.ask_admin(path, body).status == 200
        refuse_all()
        assert update(front)[1]["outcome"] == "updated"
        refuse_all()
        assert front.ask(PATH, BODY).header("x-weight-version") == "7"


def test_engines_that_go_on_in_the_middle_of_an_update_are_fenced() -> None:
    with RlEngine() as one, gateway(one) as front:
        for path, body in (("/pause", {}), ("/start_weight_update", {}), ("/resume", {})):
            assert front.ask_admin(path, body).status == 200
        assert front.ask(PATH, BODY).status == 503
        assert update(front)[1]["outcome"] == "updated"
        assert front.ask(PATH, BODY).status == 200


def test_stream_over_an_update_says_so() -> None:
    release = asyncio.Event()

    async def long(exchange: Exchange) -> None:
        await exchange.start(SSE)
        await exchange.chunk(b"data: 1\n\n")
        await release.wait()
        await exchange.chunk(b"data: 2\n\n")
        await exchange.end()

    with RlEngine() as one, gateway(one, limits={"read_timeout_s": 0.3, "first_byte_timeout_s": 0.3}) as front:
        one.handlers[PATH] = long
        with front.connect() as connection:
            connection.sendall(make_request(PATH, BODY))
            wait_until(lambda: len(one.seen) == 1)
            time.sleep(0.1)
            front.ask_admin("/pause?mode=keep", {})
            time.sleep(0.5)  # longer than an engine may be silent that is not paused
            front.ask_admin("/start_weight_update", {})
            front.ask_admin(FINISH, {"weight_version": "2"})
            front.ask_admin("/resume", {})
            one._loop.call_soon_threadsafe(release.set)
            reply = read_reply(connection)
        assert reply.header("x-weight-version") == "default"
        comment = b": x-weight-version: 2, x-draft-version: default\n\n"
        assert reply.body == b"data: 1\n\n" + comment + b"data: 2\n\n"


def test_answer_whose_head_comes_after_an_update_names_both() -> None:
    release = asyncio.Event()

    async def late(exchange: Exchange) -> None:
        await release.wait()
        await exchange.answer(b"{}")

    with RlEngine() as one, gateway(one) as front, ThreadPoolExecutor(1) as pool:
        one.handlers[PATH] = late
        waiting = pool.submit(front.ask, PATH, BODY)
        wait_until(lambda: len(one.seen) >= 1 and any(e.line.startswith("POST /v1") for e in one.seen))
        assert update(front)[0] == 200
        one._loop.call_soon_threadsafe(release.set)
        assert waiting.result(5).header("x-weight-version") == "default, 7"


@pytest.mark.slow
def test_engine_that_comes_back_with_old_weights_is_fenced() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        update(front)
        two.healthy = False
        wait_until(lambda: front.relay.pools["m"].engines[1].healthy is False)
        two.version = "default"  # restarted from its checkpoint
        two.healthy = True
        wait_until(lambda: front.relay.pools["m"].engines[1].fenced is not None)
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(4)} == {"a"}


def test_one_update_at_a_time() -> None:
    entered = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        entered.set()
        await asyncio.sleep(0.5)
        await exchange.answer(b"{}")

    with RlEngine() as one, gateway(one) as front, ThreadPoolExecutor(1) as pool:
        one.handlers["/pause"] = slow
        first = pool.submit(update, front)
        wait_until(entered.is_set)
        assert front.ask_admin("/admin/update_weights", {}).status == 409
        assert first.result(5)[0] == 200


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"weight_version": "a\r\nb"}, "weight_version"),
        ({"mode": "now"}, "mode"),
        ({"weights": []}, "weights"),
    ],
)
def test_update_that_makes_no_sense_is_refused(body: dict[str, Any], told: str) -> None:
    with RlEngine() as one, gateway(one) as front:
        reply = front.ask_admin("/admin/update_weights", body)
        assert reply.status == 422
        assert told in reply.body.decode()
        assert one.calls == []


def test_model_that_is_not_there_is_refused() -> None:
    with RlEngine() as one, gateway(one) as front:
        reply = front.ask_admin("/resume?model=none", {})
        assert reply.status == 404
        assert reply.json()["error"]["message"] == "The model 'none' does not exist: it must be one of m."


def test_routes_that_steer_go_to_all_and_are_not_on_the_public_port() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        assert front.ask_admin("/weight_info").json() == {
            "a": {"weight_version": "default"},
            "b": {"weight_version": "default"},
        }
        seen = len(one.seen)
        for path in (
            "/pause",
            "/collective_rpc",
            "/update_weights",
            "/sleep",
            "/v1/load_lora_adapter",
            "/v1/load_lora_adapter/",
            "/admin/status",
        ):
            assert front.ask(path, b"{}").status == 404
        for path in ("/v1/load_lora_adapter%0a", "/inference/v1/abort_requests%0A", "/v1/x%0d", "/v1/x%7F"):
            assert front.ask(path, b"{}").status == 400  # engines might route it as if that were not there
        assert len(one.seen) == seen
        assert front.relay.pools["m"].paused is False


def test_parameters_of_one_name_all_reach_the_engines() -> None:
    async def wake(exchange: Exchange) -> None:
        await exchange.answer(b"{}")

    with RlEngine() as one, gateway(one) as front:
        one.handlers["/wake_up"] = wake
        assert front.ask_admin("/wake_up?tags=weights&model=m&tags=kv_cache", {}).status == 200
        assert one.seen[-1].line == "POST /wake_up?tags=weights&tags=kv_cache HTTP/1.1"


def test_update_that_is_under_way_is_finished_before_the_end() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow(RlEngine):
        async def step(self, exchange: Exchange) -> None:
            if exchange.line.split(" ")[1] == "/update_weights":
                reached.set()
                await asyncio.to_thread(go_on.wait, 10)
            await super().step(exchange)

    with Slow() as one, gateway(one) as front, ThreadPoolExecutor(1) as pool:
        update = pool.submit(front.ask_admin, "/admin/update_weights", {"update": [{"names": ["w"]}]})
        assert reached.wait(10)
        front.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: front.ask(PATH, b"{}").status == 503)
        go_on.set()
        assert update.result(10).json()["outcome"] == "updated"
    assert (one.calls[-1], one.paused) == ("/resume", False)


def test_browsers_and_strange_hosts_may_not_steer() -> None:
    with RlEngine() as one, gateway(one) as front:
        reply = front.ask_admin("/pause", {}, "origin: http://evil.invalid\r\n")
        assert (reply.status, "Pages may not steer engines" in reply.json()["error"]["message"]) == (403, True)
        reply = front.ask_admin("/admin/status", None, host="evil.invalid")
        assert (reply.status, "names another machine" in reply.json()["error"]["message"]) == (400, True)
        assert one.calls == []
        for host in ("127.0.0.1:8081", "localhost", "LOCALHOST:1", "[::1]:8081", "[::1]"):
            assert front.ask_admin("/admin/status", None, host=host).status == 200


@pytest.mark.parametrize("body", [b"xxx", b'{"a": ', b"\xff\xfe", b"[" * 100_000], ids=["word", "cut", "bytes", "deep"])
def test_body_that_is_no_json_is_400(body: bytes) -> None:
    paths = (
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/admin/update_weights",
        "/update_weights",
        "/finish_weight_update",
    )
    with RlEngine() as one, gateway(one) as front:
        for path in paths:
            reply = ask_raw(front, path, body)
            assert reply.status == 400, path
            assert re.search("no JSON|parsing the body", reply.body.decode())
        assert one.calls == []


def test_errors_have_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's, whoever finds the fault: the guard, a route, the framework, an engine, or nobody."""

    async def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(status_page, "describe", fail)
    cases = [
        ("POST", "/resume?model=none", 404, "The model 'none' does not exist"),
        ("GET", "/nowhere", 404, "There is no route GET /nowhere."),
        ("DELETE", "/pause", 405, "/pause: expected POST, got DELETE."),
        ("POST", "/pause?mode=now", 422, "query.mode: "),
        ("POST", "/admin/models/load", 422, "query.model: Field required"),
        ("POST", "/admin/models/load?model=m", 404, "is not the gateway's to load"),
        ("POST", "/init_weight_transfer_engine", 502, "/init_weight_transfer_engine: a: HTTP 404"),
        ("GET", "/admin/status", 500, "The server had an error"),
    ]
    with RlEngine() as one, gateway(one) as front:
        one.handlers["/init_weight_transfer_engine"] = one.refuse
        for method, path, status, told in cases:
            with socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as connection:
                connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n".encode())
                reply = read_reply(connection)
            assert reply.status == status, path
            error = reply.json()["error"]
            assert told in error["message"], path
            kind = "invalid_request_error" if status < 500 else "server_error"
            assert (error["type"], error["param"], set(error)) == (kind, None, {"message", "type", "param", "code"})
            assert "detail" not in reply.json()
            assert status != 405 or reply.header("allow") == "POST"
            assert status != 502 or set(reply.json()["upstreams"]) == {"a"}


@pytest.mark.parametrize("body", [b"3", b"[]", b'"x"'])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    with RlEngine() as one, gateway(one) as front:
        assert ask_raw(front, "/sleep", body).status == 400
        assert ask_raw(front, "/admin/update_weights", body).status == 422
        assert one.calls == []


@pytest.mark.parametrize("kind", ["", "content-type: application/x-www-form-urlencoded\r\n"])
def test_body_that_is_not_called_json_is_told_the_header(kind: str) -> None:
    body = json.dumps({"weight_version": "7", "update": [{"names": ["w"]}]}).encode()
    with RlEngine() as one, gateway(one) as front:
        reply = ask_raw(front, "/admin/update_weights", body, kind)
        assert reply.status == 415
        assert "expected application/json" in reply.json()["error"]["message"]
        assert one.calls == []


def test_update_that_fails_says_what_the_engine_said() -> None:
    cause = "/new/v7: expected a folder of safetensors, got none; write it first" + " " * 200 + "at the end"

    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"error": {"message": cause}}).encode(), status="500 No")

    with RlEngine() as one, gateway(one) as front:
        one.handlers["/update_weights"] = refuse
        assert update(front)[1]["error"] == f"/update_weights: a: HTTP 500: {cause}"


def ask_raw(front: Gateway, path: str, body: bytes, kind: str = "content-type: application/json\r\n") -> Reply:
    request = make_request(path, body, kind).replace(b"host: x", b"host: localhost")
    with socket.create_connection(("127.0.0.1", front.admin_port), timeout=10) as connection:
        connection.sendall(request)
        return read_reply(connection)


def test_admin_key_is_needed_where_there_is_one() -> None:
    admin = {"sha256": hashlib.sha256(b"root").hexdigest()}
    with RlEngine() as one, gateway(one, admin=admin) as front:
        assert front.ask_admin("/admin/status").status == 401
        assert front.ask_admin("/admin/status", None, "authorization: Bearer root\r\n").status == 200


def test_status_tells_engines_and_errors() -> None:
    async def die(exchange: Exchange) -> None:
        exchange.abort()

    async def metrics(exchange: Exchange) -> None:
        text = "vllm:spec_decode_num_drafts_total 10\nvllm:spec_decode_num_accepted_tokens_total 25\n"
        await exchange.answer((text + 'vllm:generation_tokens_total{engine="0"} 100\n').encode(), "")

    with RlEngine() as one, gateway(one) as front:
        one.handlers["/v1/bad"] = die
        one.handlers["/metrics"] = metrics
        front.ask(PATH, BODY)
        front.ask("/v1/bad", BODY, "x-request-id: lost-1\r\n")
        front.wait_idle()
        status = front.ask_admin("/admin/status").json()
        (engine,) = status["models"]["m"]["upstreams"]
        assert (engine["name"], engine["state"], engine["requests"]) == ("a", "up", 1)
        assert engine["acceptance_length"] == 3.5
        (error,) = status["last_errors"]
        assert (error["request_id"], error["status"], error["upstream"]) == ("lost-1", 502, "a")
        page = front.ask_admin("/").body.decode()
        for shown in ("3.50", "lost-1", "the engine was lost", "/v1/bad", '<span class="state up">up</span>'):
            assert shown in page
