"""X-Weight-Policy: which engines may answer, who waits, who is refused, and nobody is held up by others' policies."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_engine import FINISH, PATH, VERSION, RlEngine
from gateway_fakes import Exchange, Gateway, gateway, wait_until

from laguna_serve.serving.gateway.config import Config, parse_config
from laguna_serve.serving.gateway.config.tables import Limits, Model
from laguna_serve.serving.gateway.config.tables import Upstream as UpstreamTable
from laguna_serve.serving.gateway.engines import health
from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.engines.weight_policy import find_latest, number_of, read_policy
from laguna_serve.serving.gateway.relay.exchange import Exchange as Exchanged
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.failures import StaleError
from laguna_serve.serving.gateway.wire.http1 import Connection

BODY = b'{"model": "m", "prompt": "x"}'


def make_pool(*versions: str, slots: int = 1, **limits: Any) -> Pool:
    """An engine for each version, named after it."""
    upstreams = tuple(
        UpstreamTable(name=f"{at}-{version}", url=f"http://127.0.0.1:{at + 1}", max_in_flight=slots)
        for at, version in enumerate(versions)
    )
    model, given = Model(name="m", upstreams=upstreams), Limits(**limits)
    pool = Pool(model, given)
    pool.configure(model, given)
    for engine, version in zip(pool.engines, versions, strict=True):
        engine.versions, engine.versions_known = (version.encode(), b"default"), True
    return pool


def policy(text: str) -> Any:
    return read_policy({b"x-weight-policy": text.encode()})


@pytest.mark.parametrize(
    ("version", "number"), [(b"step-12", 12), (b"default", 0), (b"v1.10", 10), (b"final", None), (b"7", 7)]
)
def test_number_of_a_version(version: bytes, number: int | None) -> None:
    assert number_of(version) == number


def test_newest_is_by_number() -> None:
    assert find_latest([b"step-9", b"step-10", b"final"]) == b"step-10"
    assert find_latest([b"final", b"default"]) == b"default"


@pytest.mark.parametrize("blank", [" ", "\t", "  \t"])
def test_blanks_around_a_value_are_none_of_it(blank: str) -> None:
    assert policy(f"{blank}any{blank}") is None
    assert policy(f"{blank}min-version=2{blank}") == policy("min-version=2")


@pytest.mark.parametrize(
    "text", ["latest", "min-version", "min-version=", "max-staleness=-1", "ANY", "min-version=1.5"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(
        GatewayError, match="must be any, latest-only, min-version=N or max-staleness=K, got"
    ) as refused:
        policy(text)
    assert refused.value.status == 400


def allows(text: str, version: str, versions: list[str]) -> bool:
    """The rule, literally, for versions that all have numbers."""
    kind, _, given = text.partition("=")
    own, newest = (max(int(n) for n in re.findall(r"\d+", v)[-1:]) for v in (version, max(versions, key=newest_first)))
    return {
        "any": True,
        "latest-only": own == newest,
        "min-version": own >= int(given or 0),
        "max-staleness": newest - own <= int(given or 0),
    }[kind]


def newest_first(version: str) -> int:
    return int(re.findall(r"\d+", version)[-1])


def test_choice_is_the_rules() -> None:
    rng = random.Random(0)
    for _ in range(500):
        versions = [f"step-{rng.randrange(12)}" for _ in range(rng.randint(1, 5))]
        text = rng.choice(
            ["any", "latest-only", f"min-version={rng.randrange(13)}", f"max-staleness={rng.randrange(5)}"]
        )
        pool = make_pool(*versions, slots=2)
        allowed = {e.name for e, v in zip(pool.engines, versions, strict=True) if allows(text, v, versions)}
        given = policy(text)
        if allowed:
            engine = pool.take(None, policy=given)
            assert engine is not None
            assert engine.name in allowed
            continue
        with pytest.raises(GatewayError, match=rf"for X-Weight-Policy {text}: the newest is") as refused:
            pool.take(None, policy=given)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)


def test_it_waits_while_weights_are_changed_and_is_refused_when_they_are_too_old() -> None:
    async def test() -> None:
        pool = make_pool("step-1", slots=4)
        pool.pause()
        both = [asyncio.create_task(pool.acquire(None, policy=policy(f"min-version={n}"))) for n in (2, 3)]
        plain = asyncio.create_task(pool.acquire(None))
        await asyncio.sleep(0)
        assert pool.queued == 3
        pool.set_versions("step-2", None)
        pool.resume()
        assert (await both[0]).name == (await plain).name == "0-step-1"
        with pytest.raises(GatewayError, match=r"min-version=3: the newest is step-2"):
            await both[1]
        assert pool.queued == 0

    asyncio.run(test())


def test_those_without_a_policy_pass_by_one_that_waits() -> None:
    """It waits for the new engine's slot; the old engine is idle, and takes those who come behind."""

    async def test() -> None:
        pool = make_pool("step-1", "step-2")
        held = pool.take(None, policy=policy("latest-only"))
        assert held is not None
        picky = asyncio.create_task(pool.acquire(None, policy=policy("latest-only")))
        await asyncio.sleep(0)
        got = await asyncio.wait_for(pool.acquire(None), 2)
        assert got.name == "0-step-1"
        assert not picky.done()
        behind = asyncio.create_task(pool.acquire(None))
        await asyncio.sleep(0.01)
        pool.release(got)  # the one behind gets it, though the picky one is woken first
        assert (await asyncio.wait_for(behind, 2)).name == "0-step-1"
        pool.release(held)
        assert (await asyncio.wait_for(picky, 2)).name == "1-step-2"

    asyncio.run(test())


def test_those_who_wait_for_new_weights_fill_no_queue_for_the_others() -> None:
    async def test() -> None:
        pool = make_pool("step-1", "step-2", max_queued=2)
        held = pool.take(None, policy=policy("latest-only"))
        assert held is not None
        picky = [asyncio.create_task(pool.acquire(None, policy=policy("latest-only"))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(GatewayError) as refused:
            await pool.acquire(None, policy=policy("latest-only"))
        assert refused.value.status == 429
        assert (await asyncio.wait_for(pool.acquire(None), 2)).name == "0-step-1"
        plain = [asyncio.create_task(pool.acquire(None)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(GatewayError):
            await pool.acquire(None)
        for task in (*picky, *plain):
            task.cancel()

    asyncio.run(test())


@pytest.mark.slow
def test_crowd_ends_with_every_slot_free() -> None:
    """500 requests of all policies, some of which leave: each gets weights that it may have, and nobody is left."""

    async def test() -> None:
        rng, pool = (
            random.Random(1),
            make_pool("step-1", "step-2", "step-3", slots=2, queue_timeout_s=30, max_queued=600),
        )
        texts = ["any", "latest-only", "min-version=2", "max-staleness=1", "max-staleness=2"]
        versions = [engine.versions[0].decode() for engine in pool.engines]

        async def ask(text: str) -> None:
            engine: Engine = await pool.acquire(None, policy=policy(text))
            assert allows(text, engine.versions[0].decode(), versions)
            try:
                await asyncio.sleep(rng.random() * 0.002)
            finally:
                pool.release(engine)

        tasks = [asyncio.create_task(ask(rng.choice(texts))) for _ in range(500)]
        for task in rng.sample(tasks, 60):
            await asyncio.sleep(0.001)
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)] == []
        assert (pool.queued, [engine.in_flight for engine in pool.engines]) == (0, [0, 0, 0])

    asyncio.run(test())


def ask(front: Gateway, given: str) -> tuple[int, str | None]:
    reply = front.ask(PATH, BODY, headers=f"X-Weight-Policy: {given}\r\n")
    return reply.status, reply.header("x-upstream")


def test_gateway_before_engines_of_two_versions() -> None:
    """As after a restart of the gateway, or where a trainer reached one of them alone."""
    with RlEngine() as old, RlEngine() as new:
        old.version, new.version = "step-4", "step-6"
        with gateway(old, new) as front:
            assert {ask(front, "latest-only") for _ in range(4)} == {(200, "b")}
            assert {ask(front, "max-staleness=1") for _ in range(4)} == {(200, "b")}
            assert {ask(front, "any") for _ in range(16)} == {(200, "a"), (200, "b")}
            assert ask(front, "min-version=7") == (503, None)
            assert ask(front, "newest") == (400, None)


def test_one_that_is_late_with_its_version_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first answer comes too late for the health check: it counts as well, and not as one with the checkpoint's."""
    monkeypatch.setattr(health, "VERSION_TIMEOUT_S", 0.1)
    with RlEngine() as old, RlEngine() as new:
        old.version, new.version = "step-4", "step-6"
        tell, late = new.tell, threading.Event()

        async def tell_late(exchange: Exchange) -> None:
            if late.is_set():
                await tell(exchange)
            else:
                await asyncio.sleep(0.3)

        new.handlers[VERSION] = tell_late
        with gateway(old, new, health={"interval_s": 300}) as front:
            engine = front.relay.pools["m"].engines[1]
            assert (engine.healthy, engine.versions_known) == (True, False)
            assert {ask(front, "any") for _ in range(2)} == {(200, "a"), (200, "b")}
            assert ask(front, "min-version=4") == (200, "a")
            with ThreadPoolExecutor(2) as clients:
                waiting = [clients.submit(ask, front, text) for text in ("latest-only", "min-version=5")]
                wait_until(lambda: front.relay.pools["m"].queued == 2)
                late.set()
                assert [each.result() for each in waiting] == [(200, "b")] * 2


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests", "408 Request Timeout"])
def test_one_that_has_no_time_to_say_its_version_is_asked_again(status: str) -> None:
    with RlEngine() as old, RlEngine() as new:
        old.version, new.version = "step-4", "step-6"
        tell = new.tell

        async def tell_second(exchange: Exchange) -> None:
            new.handlers[VERSION] = tell
            await exchange.answer(b"{}", status=status)

        new.handlers[VERSION] = tell_second
        with gateway(old, new, health={"interval_s": 300}) as front:
            assert ask(front, "latest-only") == (200, "b")


def test_one_that_goes_before_it_says_its_version_is_waited_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "VERSION_TIMEOUT_S", 0.1)

    async def be_late(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)

    with RlEngine() as old, RlEngine() as new, ThreadPoolExecutor(1) as clients:
        old.version, new.handlers[VERSION] = "step-4", be_late
        with gateway(old, new, health={"interval_s": 0.1}, limits={"queue_timeout_s": 60}) as front:
            waiting = clients.submit(ask, front, "latest-only")
            wait_until(lambda: front.relay.pools["m"].queued == 1)
            new.healthy = False
            assert waiting.result() == (200, "a")


def test_version_that_is_never_told_is_the_reason_given() -> None:
    async def test() -> None:
        pool = make_pool("step-1", "step-2", queue_timeout_s=0.05)
        pool.engines[1].versions_known = False
        with pytest.raises(
            GatewayError, match=r"has not reported its weight version, needed for X-Weight-Policy latest-only"
        ):
            await pool.acquire(None, policy=policy("latest-only"))
        pool.note_versions_known(pool.engines[1])
        assert (await pool.acquire(None, policy=policy("latest-only"))).name == "1-step-2"

    asyncio.run(test())


@pytest.mark.parametrize(("other", "expected"), [("step-6", (200, "b")), ("step-4", (503, None))])
def test_engine_that_goes_between_choice_and_request_is_replaced_by_one_with_such_weights(
    other: str, expected: tuple[int, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kept connection turns out to be stale, and there is no new one: who asked for the newest gets no older."""
    stale = list[str]()
    on_error, is_usable = Exchanged.on_error, Connection.is_usable

    def note(self: Exchanged, error: OSError) -> None:
        if isinstance(error, StaleError) and self.engine is not None:
            stale.append(self.engine.name)
        on_error(self, error)

    with RlEngine() as two, contextlib.ExitStack() as first:
        one = RlEngine()
        first.enter_context(one)
        one.version, two.version = "step-6", other
        with gateway(one, two) as front:
            assert {ask(front, "any"), ask(front, "any")} == {(200, "a"), (200, "b")}
            front.wait_idle()
            origin = front.relay.pools["m"].engines[0].origin

            def leave(connection: Connection) -> bool:
                """The engine ends when the request has it already; to the gateway its connection looked well."""
                usable = is_usable(connection)
                if connection._origin is origin:
                    transport = connection._transport
                    assert transport is not None
                    transport.set_protocol(asyncio.Protocol())
                    first.close()
                    connection.connection_lost(None)
                return usable

            monkeypatch.setattr(Exchanged, "on_error", note)
            monkeypatch.setattr(Connection, "is_usable", leave)
            before = len(one.seen), len(two.seen)
            assert ask(front, "latest-only") == expected
            assert stale == ["a"]
            assert (len(one.seen), len(two.seen)) == (before[0], before[1] + (expected[0] == 200))
            front.wait_idle()


@pytest.mark.slow
def test_engine_that_was_started_again_between_two_checks_is_fenced_off() -> None:
    """It was never seen to be down, and has the checkpoint's weights: miles#1724."""
    with RlEngine() as one, RlEngine() as two, gateway(one, two, health={"interval_s": 0.1}) as front:
        weights = {"weight_version": "7", "update": [{"names": ["w"]}]}
        assert front.ask_admin("/admin/update_weights", weights).json()["outcome"] == "updated"
        assert {front.ask(PATH, BODY).header("x-weight-version") for _ in range(4)} == {"7"}
        engine = front.relay.pools["m"].engines[0]
        one.version = "default"
        wait_until(lambda: engine.fenced is not None, 10)
        assert engine.fenced == "weights: expected version 7, got default"
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(4)} == {"b"}


WEIGHTS = {"weight_version": "7", "update": [{"names": ["w"]}]}
OFTEN = {"interval_s": 0.1}


def restart(front: Gateway, one: RlEngine) -> Engine:
    """Let the first engine be away, and come back with the checkpoint's weights."""
    engine: Engine = front.relay.pools["m"].engines[0]
    front.loop.call_soon_threadsafe(engine.note_unreachable, "restarted")
    one.version = "default"
    return engine


def test_engine_that_does_not_tell_its_version_after_a_restart_is_fenced_off() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two, health=OFTEN) as front:
        assert front.ask_admin("/admin/update_weights", WEIGHTS).json()["outcome"] == "updated"
        one.handlers[VERSION] = one.refuse
        engine = restart(front, one)
        wait_until(lambda: engine.fenced == "weights: expected version 7, got none that it would tell", 10)
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(8)} == {"b"}


@pytest.mark.slow
def test_engine_that_does_not_answer_for_its_version_stays_down_until_it_does() -> None:
    async def hang_up(exchange: Exchange) -> None:
        exchange.abort()

    with RlEngine() as one, RlEngine() as two, gateway(one, two, health=OFTEN) as front:
        assert front.ask_admin("/admin/update_weights", WEIGHTS).json()["outcome"] == "updated"
        one.handlers[VERSION] = hang_up
        engine = restart(front, one)
        asked = len(one.checks)
        wait_until(lambda: len(one.checks) >= asked + 3, 10)
        assert (engine.up, engine.fenced) == (False, None)
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(8)} == {"b"}
        one.version, one.handlers[VERSION] = "7", one.tell
        wait_until(lambda: engine.up, 10)


def test_drafter_of_an_engine_that_was_away_is_unknown() -> None:
    """Its tokens are right with any drafter, and vLLM does not say which it has."""
    update = {"draft_version": "d-3", "draft_update": [{"names": ["w"]}]}
    with RlEngine() as one, RlEngine() as two, gateway(one, two, health=OFTEN) as front:
        assert front.ask_admin("/admin/update_weights", update).json()["outcome"] == "updated"
        engine = restart(front, one)
        wait_until(lambda: engine.up and engine.versions[1] == b"unknown", 10)
        replies = [front.ask(PATH, BODY) for _ in range(16)]
        drafts = {(reply.header("x-upstream"), reply.header("x-draft-version")) for reply in replies}
        assert drafts == {("a", "unknown"), ("b", "d-3")}
        assert front.ask_admin("/admin/update_weights", update).json()["outcome"] == "updated"
        assert {front.ask(PATH, BODY).header("x-draft-version") for _ in range(8)} == {"d-3"}


def reload(front: Gateway, **urls: str) -> None:
    """Take a configuration with these engines."""
    upstreams = [{"name": name, "url": url} for name, url in urls.items()]
    tables = {"models": [{"name": "m", "upstreams": upstreams}], "health": OFTEN, "server": {"port": front.port}}
    asyncio.run_coroutine_threadsafe(configure(front, parse_config(tables, "test")), front.loop).result(10)


async def configure(front: Gateway, config: Config) -> None:
    front.relay.configure(config)


def test_engine_that_a_reload_brings_after_an_update_has_its_version() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, health=OFTEN) as front:
        assert front.ask_admin("/admin/update_weights", WEIGHTS).json()["outcome"] == "updated"
        two.version = "7"
        reload(front, b=two.url)
        reply = front.ask(PATH, BODY)  # at once: it waits until the engine has been asked
        assert (reply.status, reply.header("x-weight-version")) == (200, "7")
        reload(front, a=one.url, b=two.url)
        wait_until(lambda: all(engine.up for engine in front.relay.pools["m"].engines))
        replies = [front.ask(PATH, BODY) for _ in range(8)]
        found = {(r.header("x-upstream"), r.header("x-weight-version"), r.header("x-draft-version")) for r in replies}
        assert found == {("a", "7", "default"), ("b", "7", "default")}


def wait_for_checks(*engines: RlEngine) -> None:
    """Until each has been asked for its version often enough to be fenced off."""
    before = [len(engine.checks) for engine in engines]
    wait_until(lambda: all(len(e.checks) >= n + 4 for e, n in zip(engines, before, strict=True)), 20)


NAMELESS = [{"draft_version": "d-3", "draft_update": [{"names": ["d"]}]}, {"update": [{"names": ["w"]}]}]


@pytest.mark.parametrize("given", NAMELESS, ids=["drafter", "model"])
def test_gateway_that_came_later_keeps_the_version_that_an_update_does_not_name(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RECHECK_S", 0.05)
    with RlEngine() as one, RlEngine() as two:
        one.version = two.version = "step-7"
        with gateway(one, two, health=OFTEN) as front:
            assert front.ask_admin("/admin/update_weights", given).json()["outcome"] == "updated"
            wait_for_checks(one, two)
            replies = [front.ask(PATH, BODY) for _ in range(4)]
            found = {(r.header("x-upstream"), r.header("x-weight-version")) for r in replies}
            assert found == {("a", "step-7"), ("b", "step-7")}


def test_gateway_that_came_later_brings_engines_back_to_their_version() -> None:
    with RlEngine() as one, RlEngine() as two:
        one.version = two.version = "step-7"
        two.fail_once = {FINISH}
        with gateway(one, two) as front:
            back = {"rollback": {"update": [{"names": ["old"]}]}}
            report = front.ask_admin("/admin/update_weights", {**WEIGHTS, "weight_version": "step-8", **back}).json()
            assert report["outcome"] == "rolled_back"
            assert (one.version, two.version) == ("step-7", "step-7")
            assert ask(front, "min-version=7")[0] == 200


def test_engines_that_differ_are_brought_together_by_whole_weights_with_a_name_alone() -> None:
    with RlEngine() as one, RlEngine() as two:
        one.version, two.version = "step-4", "step-6"
        with gateway(one, two) as front:
            for given in NAMELESS:
                report = front.ask_admin("/admin/update_weights", given).json()
                assert report["outcome"] == "unchanged"
                assert "as engines have different weights, or have not said which" in report["error"]
            assert front.ask_admin("/start_draft_weight_update", {}).status == 409
            assert (one.calls, two.calls) == ([], [])
            two.fail_once = {FINISH}
            named = {"weight_version": "step-5", "update": [{"names": ["old"]}]}
            report = front.ask_admin("/admin/update_weights", {**WEIGHTS, "rollback": named}).json()
            assert (report["outcome"], one.version, two.version) == ("rolled_back", "step-5", "step-5")
            assert [each["weight_version"] for each in report["upstreams"].values()] == ["step-5", "step-5"]
            assert front.ask_admin("/admin/update_weights", WEIGHTS).json()["outcome"] == "updated"


def test_way_back_of_engines_that_differ_has_to_say_to_where() -> None:
    with RlEngine() as one, RlEngine() as two:
        one.version, two.version, two.fail_once = "step-4", "step-6", {FINISH}
        with gateway(one, two) as front:
            given = {**WEIGHTS, "rollback": {"update": [{"names": ["old"]}]}}
            assert front.ask_admin("/admin/update_weights", given).json()["outcome"] == "unavailable"


def test_update_by_steps_without_a_name_keeps_the_version_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "RECHECK_S", 0.05)
    with RlEngine() as one, RlEngine() as two:
        one.version, two.version = "step-7", "step-6"
        with gateway(one, two, health=OFTEN) as front:
            for path in ("/pause?mode=keep", "/start_weight_update"):
                assert front.ask_admin(path, {}).status == 200
            reply = front.ask_admin(FINISH, {})
            assert (reply.status, "expected a weight_version" in reply.json()["error"]["message"]) == (409, True)
            assert front.ask_admin(FINISH, {"weight_version": "step-8"}).status == 200
            assert front.ask_admin("/resume", {}).status == 200
        with gateway(one, two, health=OFTEN) as front:
            for path in ("/pause?mode=keep", "/start_draft_weight_update", FINISH, "/resume"):
                assert front.ask_admin(path, {}).status == 200
            wait_for_checks(one, two)
            assert {front.ask(PATH, BODY).header("x-weight-version") for _ in range(4)} == {"step-8"}


def test_gateway_that_came_later_hears_of_an_engine_that_was_started_again() -> None:
    with RlEngine() as one, RlEngine() as two:
        one.version = two.version = "step-7"
        with gateway(one, two, health=OFTEN) as front:
            one.version = "default"
            engine = front.relay.pools["m"].engines[0]
            wait_until(lambda: engine.versions[0] == b"default", 10)
            assert ask(front, "latest-only") == (200, "b")


@pytest.mark.slow
def test_engine_that_comes_back_while_requests_are_held_is_asked_before_they_go_on() -> None:
    with RlEngine() as one, RlEngine() as two, gateway(one, two, health=OFTEN) as front:
        assert front.ask_admin("/admin/update_weights", WEIGHTS).json()["outcome"] == "updated"
        assert front.ask_admin("/pause?mode=wait", {}).status == 200
        engine = restart(front, one)
        checked = len(one.checks)
        wait_until(lambda: len(one.checks) >= checked + 3, 10)
        assert not engine.up
        assert front.ask_admin("/resume", {}).status == 200
        assert {front.ask(PATH, BODY).header("x-upstream") for _ in range(8)} == {"b"}
        wait_until(lambda: engine.fenced is not None, 10)
