"""The gateway before a real masked diffusion engine: bodies, wild requests, clients that leave, an engine that dies."""

from __future__ import annotations

import gc
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from gateway_fakes import Gateway, Upstream, gateway, make_request, read_reply
from raw_requests import REQUESTS
from running_diffusion import Running
from tiny_llada import write_llada

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.proposing.interface import Run
from laguna_serve.plugins.diffusion.server.generation import Generation
from laguna_serve.plugins.diffusion.server.loading import load
from laguna_serve.plugins.diffusion.server.options import parse_options
from laguna_serve.plugins.diffusion.speculation import Decoder

pytestmark = pytest.mark.slow

TEXT = {"model": "toy", "prompt": "once", "max_tokens": 24}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 16}
LONG = {**TEXT, "max_tokens": 240, "block_length": 240, "ignore_eos": True, "stream": True}
CASES: list[tuple[str, dict[str, Any] | bytes | None]] = [
    ("/v1/models", None),
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}),
    ("/v1/completions", {**TEXT, "n": 3, "temperature": 0.9, "seed": 4, "logprobs": 3}),
    ("/v1/completions", {**TEXT, "stream": True, "logprobs": 2, "block_length": 8}),
    ("/v1/completions", {**TEXT, "canvas_length": 32, "steps": 8, "block_length": 8}),
    ("/v1/completions", {**TEXT, "prompt": ""}),
    ("/v1/completions", {**TEXT, "top_p": 0.5}),
    ("/v1/completions", {**TEXT, "unknown_field": 1}),
    ("/v1/completions", {**TEXT, "model": "another"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", b'{"model": "toy", "messages": [{'),
    ("/tokenize", {"model": "toy", "prompt": "café"}),
    ("/detokenize", {"model": "toy", "tokens": [70, 71]}),
]
JSON = "content-type: application/json\r\n"
CHANGING = re.compile(rb'"(id)":"[^"]*"|"(created)":[0-9]+')
ABORTS, HALF, CLIENTS = 1000, 500, 16
# Objects of each kind, and bytes of the process, that the second half of the aborts may leave behind.
FEW, SOME_BYTES = 8, 16 << 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_llada(tmp_path_factory.mktemp("toy") / "toy")
    draft = write_llada(tmp_path_factory.mktemp("draft") / "draft", error=0.02)
    flags = ["--cache", "dual", "--draft", str(draft), "--draft-policy", "always"]
    with Running(load(parse_options([str(folder), *flags])), waiting=2000) as running:
        yield running


@pytest.fixture(scope="module")
def front(engine: Running) -> Iterator[Gateway]:
    with gateway(Upstream(url=engine.url), model={"name": "toy"}) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(front: Gateway, engine: Running) -> Iterator[None]:
    """After each test nothing runs, and the engine's answers are what they were."""
    before = engine.http.post("/v1/completions", json=TEXT).json()["choices"]
    yield
    front.wait_idle(30)
    engine.wait(lambda: engine.read("num_requests_running") == engine.read("num_requests_waiting") == 0)
    assert json.loads(front.ask("/v1/completions", json.dumps(TEXT).encode(), JSON).body)["choices"] == before


def complete(body: dict[str, Any]) -> bytes:
    return make_request("/v1/completions", json.dumps(body).encode(), JSON)


def ask(port: int, path: str, body: bytes | None) -> tuple[int, str | None, bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(make_request(path, body, JSON))
        reply = read_reply(connection)
    assert not reply.cut
    return reply.status, reply.header("content-type"), CHANGING.sub(b"", reply.body)


@pytest.mark.parametrize(("path", "body"), CASES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(CASES)])
def test_bodies_are_the_engines(
    front: Gateway, engine: Running, path: str, body: dict[str, Any] | bytes | None
) -> None:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    through, direct = ask(front.port, path, data), ask(urlsplit(engine.url).port or 0, path, data)
    if body is not None and b"another" in (data or b""):
        assert (through[0], direct[0]) == (404, 404)  # each in its own words: the gateway lists what it has
    else:
        assert through == direct


def test_wild_requests_leave_it_whole(front: Gateway) -> None:
    """Whatever is smuggled, split or cut off, the engine behind is asked nothing that it cannot bear."""
    for request in REQUESTS.values():
        with front.connect() as connection:
            connection.settimeout(0.05)
            try:
                connection.sendall(request)
                while connection.recv(65536):
                    pass
            except OSError:  # it waits for the rest, or has closed
                pass


def test_a_slow_reader_gets_everything(front: Gateway) -> None:
    body = {**LONG, "max_tokens": 96, "block_length": 8, "return_token_ids": True}
    with front.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(complete(body))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(512)
            time.sleep(0.001)
    ids = [json.loads(found) for found in re.findall(rb'"token_ids":(\[[0-9,]+\])', received)]
    assert sum(map(len, ids)) == 96
    assert b"data: [DONE]" in received


def leave_after_the_first_event(front: Gateway, number: int) -> None:
    with front.connect() as connection:
        connection.sendall(complete({**LONG, "seed": number}))
        if number % 3:  # every third does not wait for anything
            assert connection.recv(1)


def count_kept() -> dict[str, int]:
    gc.collect()
    kinds = (Canvas, Run, Generation)
    return {kind.__name__: sum(issubclass(type(each), kind) for each in gc.get_objects()) for kind in kinds}


def test_a_thousand_clients_that_leave(front: Gateway, engine: Running) -> None:
    """The second half of them leaves nothing beside what the first has."""
    kept, sizes = [], []
    for half in range(ABORTS // HALF):
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: leave_after_the_first_event(front, n), range(half * HALF, (half + 1) * HALF)))
        front.wait_idle(60)
        engine.wait(lambda: engine.read("num_requests_running") == engine.read("num_requests_waiting") == 0)
        kept.append(count_kept())
        sizes.append(psutil.Process().memory_info().rss)
    assert all(kept[1][name] <= kept[0][name] + FEW for name in kept[0]), kept
    assert sizes[1] - sizes[0] < SOME_BYTES


def test_a_death_in_a_stream_is_an_error_and_then_refused(
    engine: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Running(load(parse_options([str(write_llada(tmp_path / "toy"))]))) as mortal:
        with gateway(Upstream(url=mortal.url), model={"name": "toy"}, limits={"queue_timeout_s": 0.5}) as front:
            with front.connect() as connection:
                connection.sendall(complete(LONG))
                assert connection.recv(1)

                def fail(*_: object, **__: object) -> None:
                    raise SystemExit("no such luck")

                monkeypatch.setattr(Decoder, "advance", fail)
                rest = b"".join(read_rest(connection))
            assert b'"error"' in rest
            assert b"data: [DONE]" in rest
            assert front.ask("/v1/completions", json.dumps(TEXT).encode(), JSON).status in (502, 503)
        monkeypatch.undo()


def read_rest(connection: socket.socket) -> Iterator[bytes]:
    """What comes until the answer's last chunk."""
    received = b""
    while not received.endswith(b"0\r\n\r\n") and (data := connection.recv(65536)):
        received += data
        yield data
