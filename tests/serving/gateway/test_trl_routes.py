"""TRL's routes under /trl: ranks of several engines, updates that fail on one of them, versions, keys, the switch."""

from __future__ import annotations

import base64
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_engine import FINISH, PATH
from gateway_fakes import Exchange, Gateway, Reply, gateway, wait_until
from trl_engine import INIT, START, UPDATE, TrlEngine

from laguna_serve.serving.gateway.config import ConfigError, parse_config
from laguna_serve.serving.gateway.config.fixed import keep_fixed

BODY = b'{"model": "m", "prompt": "x"}'
SWITCH = {"trl": "m"}
JOIN = {"master_address": "10.0.0.1", "master_port": 51216, "packed": True}
TENSOR = {"update_info": {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2]]}}


def call(front: Gateway, path: str, body: Any = None, headers: str = "") -> Any:
    reply = front.ask_admin(f"/trl{path}", body, headers)
    assert reply.status == 200, reply.body
    return reply.json()


def join(front: Gateway) -> None:
    workers = call(front, "/get_world_size")["world_size"]
    call(front, INIT, {"init_info": {**JOIN, "rank_offset": 1, "world_size": workers + 1}})


def push(front: Gateway) -> None:
    call(front, START, {})
    call(front, UPDATE, TENSOR)
    call(front, FINISH, {})


def ask_all(front: Gateway) -> set[tuple[str | None, str | None]]:
    """Engines and versions that rollouts find."""
    replies = [front.ask_admin(f"/trl{PATH}", json.loads(BODY)) for _ in range(8)]
    assert {reply.status for reply in replies} == {200}
    return {(reply.header("x-upstream"), reply.header("x-weight-version")) for reply in replies}


def test_engines_have_ranks_one_behind_the_other() -> None:
    with TrlEngine(2) as one, TrlEngine(3) as two, gateway(one, two, admin=SWITCH) as front:
        assert call(front, "/get_world_size") == {"world_size": 5}
        join(front)
        assert one.joined == [{**JOIN, "rank_offset": 1, "world_size": 6}]
        assert two.joined == [{**JOIN, "rank_offset": 3, "world_size": 6}]


def test_group_of_another_size_is_refused_before_an_engine_waits_for_it() -> None:
    with TrlEngine(2) as one, TrlEngine(2) as two, gateway(one, two, admin=SWITCH) as front:
        reply = front.ask_admin(f"/trl{INIT}", {"init_info": {**JOIN, "rank_offset": 1, "world_size": 3}})
        assert (reply.status, one.joined, two.joined) == (409, [], [])
        assert "rank_offset + 4 workers, got world_size 3" in reply.json()["error"]["message"]


def test_update_holds_requests_and_advances_the_version_at_its_finish() -> None:
    with (
        TrlEngine() as one,
        TrlEngine() as two,
        gateway(one, two, admin=SWITCH) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        join(front)
        for version in ("trl-1", "trl-2"):
            call(front, START, {})
            held = pool.submit(front.ask, PATH, BODY)
            wait_until(lambda: front.relay.pools["m"].queued == 1)
            call(front, UPDATE, TENSOR)
            assert front.relay.pools["m"].queued == 1
            assert call(front, FINISH, {})["weight_version"] == version
            assert held.result(10).header("x-weight-version") == version
            assert ask_all(front) == {("a", version), ("b", version)}
        steps = [
            "/pause?mode=keep",
            START,
            UPDATE,
            FINISH,
            "/reset_prefix_cache?reset_running_requests=true",
            "/resume",
        ]
        assert one.calls == two.calls == steps * 2
        assert one.loaded == [TENSOR["update_info"]] * 2
        newest = front.ask_admin(f"/trl{PATH}", json.loads(BODY), "x-weight-policy: min-version=2\r\n")
        older = front.ask_admin(f"/trl{PATH}", json.loads(BODY), "x-weight-policy: min-version=3\r\n")
        assert (newest.status, older.status) == (200, 503)


def test_gateway_that_came_later_counts_on() -> None:
    with TrlEngine() as one, TrlEngine() as two:
        one.version, two.version = "trl-2", "step-1"
        for version in ("trl-3", "trl-4"):
            with gateway(one, two, admin=SWITCH) as front:
                join(front)
                push(front)
                assert ask_all(front) == {("a", version), ("b", version)}


@pytest.mark.parametrize("where", [START, UPDATE, FINISH])
def test_engine_that_fails_is_fenced_off_and_comes_back_with_the_next_update(where: str) -> None:
    with TrlEngine() as one, TrlEngine() as two, gateway(one, two, admin=SWITCH) as front:
        join(front)
        two.fail_once = {where}
        push(front)
        fenced = front.relay.pools["m"].engines[1].fenced
        assert fenced is not None
        assert ask_all(front) == {("a", "trl-1")}
        push(front)
        assert ask_all(front) == {("a", "trl-2"), ("b", "trl-2")}


def test_engine_that_keeps_its_version_is_fenced_off() -> None:
    with TrlEngine() as one, TrlEngine() as two, gateway(one, two, admin=SWITCH) as front:
        join(front)
        two.deaf = True
        push(front)
        assert ask_all(front) == {("a", "trl-1")}


def test_failure_of_all_is_told_once_and_nothing_answers_with_half_an_update() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        join(front)
        one.fail = {UPDATE}
        call(front, START, {})
        reply = front.ask_admin(f"/trl{UPDATE}", TENSOR)
        assert (reply.status, reply.json()["error"]["message"]) == (409, "/update_weights: a: HTTP 500: no")
        assert front.ask(PATH, BODY).status == 503
        assert front.ask_admin("/trl/health").status == 503
        reply = front.ask_admin(f"/trl{FINISH}", {})
        assert (reply.status, "call start_weight_update" in reply.json()["error"]["message"]) == (409, True)


def test_update_that_its_trainer_left_is_ended_by_the_next() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        join(front)
        call(front, START, {})
        push(front)
        assert ask_all(front) == {("a", "trl-1")}


def test_pause_of_a_trainers_own_outlasts_the_update() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        join(front)
        call(front, "/pause?mode=keep", {})
        push(front)
        assert front.relay.pools["m"].paused
        call(front, "/resume", {})
        assert ask_all(front) == {("a", "trl-1")}


def test_engines_that_came_after_the_group_must_join_it() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        reply = front.ask_admin(f"/trl{START}", {})
        assert (reply.status, "call init_weight_transfer_engine first" in reply.json()["error"]["message"]) == (
            409,
            True,
        )
        assert one.calls == []


@pytest.mark.parametrize("transfer", [{"backend": "folder"}, None])
def test_engines_without_nccl_refuse_a_group_and_say_so_where_trl_looks(transfer: dict[str, str] | None) -> None:
    with TrlEngine() as one, TrlEngine(transfer=transfer) as two, gateway(one, two, admin=SWITCH) as front:
        config = call(front, "/server_info?config_format=json")
        assert config == {
            "vllm_config": {"weight_transfer_config": None, "model_config": {"logprobs_mode": "raw_logprobs"}}
        }
        reply = front.ask_admin(f"/trl{INIT}", {"init_info": {**JOIN, "rank_offset": 1, "world_size": 3}})
        backend = None if transfer is None else transfer["backend"]
        assert (reply.status, one.joined, two.joined) == (409, [], [])
        assert "engines with the backend 'nccl' (--weight-transfer-config, on CUDA" in reply.json()["error"]["message"]
        assert f"got {backend!r} of b" in reply.json()["error"]["message"]


def test_engine_without_its_routes_for_developers_is_named() -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status="404 Not Found")

    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        one.handlers["/get_world_size"] = refuse
        reply = front.ask_admin("/trl/get_world_size")
        assert reply.status == 409
        assert reply.json()["error"]["message"].startswith("/get_world_size: a: HTTP 404")
        assert "VLLM_SERVER_DEV_MODE=1" in reply.json()["error"]["message"]


def test_prefixes_are_dropped_on_every_engine() -> None:
    with TrlEngine() as one, TrlEngine() as two, gateway(one, two, admin=SWITCH) as front:
        assert call(front, "/reset_prefix_cache", {}) == {"success": True}
        assert one.calls == two.calls == ["/reset_prefix_cache?reset_running_requests=false"]


def test_one_of_several_models_is_all_that_a_trainer_sees() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH, others=("before",)) as front:
        assert [card["id"] for card in call(front, "/v1/models")["data"]] == ["m"]
        assert ask_all(front) == {("a", "default")}


def test_body_of_a_refused_request_is_not_counted_for_good() -> None:
    digests = [hashlib.sha256(key).hexdigest() for key in (b"root", b"sk")]
    tables: dict[str, Any] = {"admin": {**SWITCH, "sha256": digests[0]}, "keys": [{"name": "k", "sha256": digests[1]}]}
    with TrlEngine() as one, gateway(one, **tables, limits={"max_queued_bytes": 100_000}) as front:
        body = {"model": "m", "prompt": "x" * 60_000}
        for _ in range(3):
            assert front.ask_admin(f"/trl{PATH}", body, basic("other", "root")).status == 401
        assert front.relay.backlog.total == 0
        assert front.ask_admin(f"/trl{PATH}", body, basic("sk", "root")).status == 200


def test_user_that_is_no_key_is_no_header() -> None:
    """It was written as it came, line ends and all: a second request to the engine, behind the first one."""
    user = "x\r\n\r\nPOST /collective_rpc HTTP/1.1"
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        assert front.ask_admin(f"/trl{PATH}", json.loads(BODY), basic(user, "")).status == 200
        assert front.ask_admin(f"/trl{PATH}", json.loads(BODY), basic("sk", "")).status == 200
        asked = [exchange for exchange in one.seen if PATH in exchange.line]
        assert [b"authorization: Bearer sk" in exchange.head for exchange in asked] == [False, True]
        assert not any("collective_rpc" in exchange.line for exchange in one.seen)


def basic(user: str, password: str) -> str:
    return f"authorization: Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}\r\n"


def test_keys_are_in_the_address() -> None:
    """The admin port's as the password, the gateway's as the user: the engine gets neither."""
    digests = [hashlib.sha256(key).hexdigest() for key in (b"root", b"sk")]
    tables: dict[str, Any] = {"admin": {**SWITCH, "sha256": digests[0]}, "keys": [{"name": "k", "sha256": digests[1]}]}

    def ask(front: Gateway, headers: str, path: str = f"/trl{PATH}") -> Reply:
        return front.ask_admin(path, json.loads(BODY), headers)

    with TrlEngine() as one, gateway(one, **tables) as front:
        for user, password, status in (("sk", "root", 200), ("sk", "", 401), ("sk", "sk", 401), ("", "root", 401)):
            assert ask(front, basic(user, password)).status == status, (user, password)
        assert ask(front, basic("", "root"), "/trl/reset_prefix_cache").status == 200
        assert ask(front, "authorization: Basic !\r\n").status == 401
        assert all(b"uthorization" not in exchange.head for exchange in one.seen)
        front.wait_idle()
        usage = front.ask_admin("/admin/usage", None, basic("", "root")).json()
        assert usage["keys"]["k"]["since_start"]["m"]["requests"] == 1


def test_it_is_off_by_default_and_never_on_the_public_port() -> None:
    with TrlEngine() as one:
        with gateway(one) as front:
            for path in ("/trl/health", "/trl/get_world_size", f"/trl{PATH}"):
                assert front.ask_admin(path).status == 404
        with gateway(one, admin=SWITCH) as front:
            for path in ("/trl/health", f"/trl{PATH}", f"/trl{START}", START, "/get_world_size", "/server_info"):
                assert front.ask(path, BODY).status == 404
        assert one.calls == []


def test_model_that_a_reload_takes_out_is_404() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        models = [{"name": "n", "upstreams": [{"name": "a", "url": one.url}]}]
        config = keep_fixed(front.relay.config, parse_config({"models": models}, "test"))
        front.loop.call_soon_threadsafe(front.relay.configure, config)
        wait_until(lambda: "n" in front.relay.pools)
        for path in ("/health", "/v1/models", "/get_world_size"):
            reply = front.ask_admin(f"/trl{path}")
            assert (reply.status, "The model 'm'" in reply.json()["error"]["message"]) == (404, True)


def test_name_of_no_model_is_refused() -> None:
    models = [{"name": "m", "upstreams": [{"name": "a", "url": "http://127.0.0.1:9"}]}]
    with pytest.raises(ConfigError, match=r"expected the name of a model as admin.trl, got 'n'"):
        parse_config({"models": models, "admin": {"trl": "n"}}, "test")
