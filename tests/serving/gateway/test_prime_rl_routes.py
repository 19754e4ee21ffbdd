"""prime-rl's update of weights by a folder, under /trl, as its client sends it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from gateway_engine import FINISH, PATH
from gateway_fakes import Gateway, Reply, gateway, wait_until
from trl_engine import START, UPDATE, TrlEngine

BODY = b'{"model": "m", "prompt": "x"}'
SWITCH = {"trl": "m"}
STEP = "/data/run/broadcasts/step_12"


def update(front: Gateway, folder: str | None) -> Reply:
    """Pause, name a folder, resume: the answer to the folder."""
    assert front.ask_admin("/trl/pause?mode=keep&clear_cache=false", {}).status == 200
    reply = front.ask_admin(f"/trl{UPDATE}", {"weight_dir": folder})
    assert front.ask_admin("/trl/resume", {}).status == 200
    return reply


@pytest.mark.parametrize(
    ("folder", "version"), [(STEP, "step_12"), ("/data/run/checkpoints/step_3/weight", "step_3"), ("/data/w", "trl-1")]
)
def test_folder_goes_to_all_engines_and_its_step_is_the_version(folder: str, version: str) -> None:
    with TrlEngine() as one, TrlEngine() as two, gateway(one, two, admin=SWITCH) as front:
        reply = update(front, folder)
        assert reply.status == 200, reply.body
        assert one.loaded == two.loaded == [{"folder": folder}]
        answers = {front.ask(PATH, BODY).header("x-weight-version") for _ in range(4)}
        assert answers == {version}


def test_requests_wait_from_the_pause_to_the_new_weights() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front, ThreadPoolExecutor(1) as pool:
        assert front.ask_admin("/trl/pause?mode=keep&clear_cache=false", {}).status == 200
        held = pool.submit(front.ask, PATH, BODY)
        wait_until(lambda: front.relay.pools["m"].queued == 1)
        assert front.ask_admin(f"/trl{UPDATE}", {"weight_dir": STEP}).status == 200
        assert held.result(10).header("x-weight-version") == "step_12"


@pytest.mark.parametrize("where", [START, UPDATE, FINISH])
def test_failure_is_said_once_and_not_repeated(where: str) -> None:
    """A client that repeats what gets 500 and above gets neither."""
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        one.fail = {where}
        reply = update(front, STEP)
        assert reply.status == 409
        assert f"{where}: a: HTTP 500: no" in reply.json()["error"]["message"]
        one.fail = set()
        assert update(front, STEP).status == 200
        assert front.ask(PATH, BODY).header("x-weight-version") == "step_12"


def test_weights_by_other_ways_are_refused_with_what_to_set() -> None:
    with TrlEngine() as one, gateway(one, admin=SWITCH) as front:
        reply = update(front, None)
        assert (reply.status, 'weight_broadcast.type = "filesystem"' in reply.json()["error"]["message"]) == (422, True)
        assert front.ask_admin(f"/trl{UPDATE}", json.loads('{"weight_dir": 3}')).status == 422
        assert one.loaded == []
        assert front.ask(PATH, BODY).status == 200
