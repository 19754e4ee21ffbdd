"""Engines of a model that are to prove that they serve with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gateway_engine import PATH, RlEngine
from gateway_fakes import Gateway, gateway

from laguna_serve.serving.gateway.engines.digests import Digests, find_differing

COMPLETION = b'{"model": "m", "prompt": "x"}'
NEW = {"weight_version": "7", "update": [{"names": ["w"]}], "digests": True}


@pytest.fixture
def engines() -> Iterator[tuple[RlEngine, RlEngine]]:
    with RlEngine() as one, RlEngine() as two:
        yield one, two


@pytest.fixture
def front(engines: tuple[RlEngine, RlEngine]) -> Iterator[Gateway]:
    with gateway(*engines) as opened:
        yield opened


def update(front: Gateway, **body: Any) -> tuple[int, dict[str, Any]]:
    reply = front.ask_admin("/admin/update_weights", NEW | body)
    return reply.status, reply.json()


def test_equal_weights_are_served(front: Gateway) -> None:
    status, report = update(front)
    assert (status, report["outcome"]) == (200, "updated")
    found = front.ask_admin("/admin/weight_digests").json()
    assert found["a"] == found["b"]
    assert set(found["a"][0]) == {"model", "draft"}


def test_other_weights_than_the_first_engines_are_not_served(
    front: Gateway, engines: tuple[RlEngine, RlEngine]
) -> None:
    """Both say that they have version 7."""
    engines[1].spoils = {"names": ["w"]}
    status, report = update(front)
    assert (status, report["outcome"]) == (502, "unavailable")
    assert report["error"] == "digests: b: expected the weights of a, got others: the model"
    assert front.ask(PATH, COMPLETION).status == 503
    assert front.ask_admin("/admin/weight_digests").status == 502
    engines[1].spoils = None
    assert update(front)[1]["outcome"] == "updated"
    assert front.ask(PATH, COMPLETION).header("x-weight-version") == "7"


def test_where_most_agree_the_others_are_named(engines: tuple[RlEngine, RlEngine]) -> None:
    engines[0].spoils = {"names": ["w"]}
    with RlEngine() as third, gateway(*engines, third) as front:
        assert update(front)[1]["error"] == "digests: a: expected the weights of b, got others: the model"


BACK = {"update": [{"names": ["old"]}]}


def test_other_weights_are_taken_back(front: Gateway, engines: tuple[RlEngine, RlEngine]) -> None:
    engines[1].spoils = {"names": ["w"]}
    status, report = update(front, rollback=BACK)
    assert (status, report["outcome"]) == (502, "rolled_back")
    assert engines[0].loaded == engines[1].loaded == [{"names": ["w"]}, {"names": ["old"]}]
    assert front.ask(PATH, COMPLETION).header("x-weight-version") == "default"


def test_engines_that_differ_after_the_way_back_are_not_served(
    front: Gateway, engines: tuple[RlEngine, RlEngine]
) -> None:
    engines[0].fail_once = {"/update_weights"}
    engines[1].spoils = {"names": ["old"]}
    status, report = update(front, rollback=BACK)
    assert (status, report["outcome"]) == (502, "unavailable")
    assert front.ask(PATH, COMPLETION).status == 503


def test_engine_that_does_not_know_its_digests_is_left_alone(
    front: Gateway, engines: tuple[RlEngine, RlEngine]
) -> None:
    """As those are that were not started with --weight-updates, or are no vLLM."""
    engines[1].handlers["/collective_rpc"] = engines[1].refuse
    status, report = update(front)
    assert (status, report["outcome"]) == (502, "unchanged")
    assert "/collective_rpc: b: HTTP 404" in report["error"]
    assert engines[0].loaded == engines[1].loaded == []
    assert front.ask(PATH, COMPLETION).status == 200


def test_answer_that_holds_no_digests_is_told(front: Gateway, engines: tuple[RlEngine, RlEngine]) -> None:
    engines[0].handlers["/collective_rpc"] = engines[0].complete
    reply = front.ask_admin("/admin/weight_digests")
    assert reply.status == 502
    assert reply.json()["error"]["message"].startswith(
        "digests: a: expected digests, got an answer where Object missing required"
    )


def test_engine_with_another_number_of_ranks_differs() -> None:
    one = Digests("a", None)
    found = find_differing({"a": [one, one], "b": [one, one], "c": [one]}, str)
    assert found == {"c": "expected the weights of a, got others: 1 ranks instead of 2"}


def test_digests_are_compared_only_where_that_is_asked() -> None:
    """Engines that are no vLLM with our worker cannot tell theirs, and take updates all the same."""
    with RlEngine() as one, RlEngine() as two, gateway(one, two) as front:
        two.handlers["/collective_rpc"] = two.refuse
        report = front.ask_admin("/admin/update_weights", {"weight_version": "7", "update": [{"names": ["w"]}]}).json()
    assert report["outcome"] == "updated"


def test_report_of_an_update_tells_the_drafters_version_apart() -> None:
    body = {"draft_version": "d7", "draft_update": [{"names": ["w"]}]}
    with RlEngine() as one, gateway(one) as front:
        report = front.ask_admin("/admin/update_weights", body).json()
    assert report["upstreams"]["a"] == {"weight_version": "default", "draft_version": "d7", "fenced": None}


def test_where_no_engine_can_be_taken_back_none_is_served(front: Gateway, engines: tuple[RlEngine, RlEngine]) -> None:
    """There is nothing to compare then, and the answer says what happened."""
    for engine in engines:
        engine.fail = {"/update_weights"}
    status, report = update(front, rollback=BACK)
    assert (status, report["outcome"]) == (502, "unavailable")
    assert report["error"].startswith("/update_weights: a: HTTP 500")
    assert front.ask(PATH, COMPLETION).status == 503


def test_way_back_compares_digests_only_where_that_is_asked(front: Gateway, engines: tuple[RlEngine, RlEngine]) -> None:
    engines[0].fail_once = {"/update_weights"}
    for engine in engines:
        engine.handlers["/collective_rpc"] = engine.refuse
    assert update(front, rollback=BACK, digests=False)[1]["outcome"] == "rolled_back"
