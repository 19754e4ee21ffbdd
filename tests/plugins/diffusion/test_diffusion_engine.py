"""The engine's thread: queue, aborts, drain, death; nothing is left of a request that has ended."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from diffusion_models import MASK, VOCABULARY, make_model
from test_diffusion_batch import decode_alone, draw_requests, make_decoder

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.engine.loop import Engine
from laguna_serve.plugins.diffusion.engine.metrics import EngineMetrics
from laguna_serve.plugins.diffusion.engine.requests import (
    Committed,
    EngineStoppedError,
    Event,
    Finished,
    Limits,
    QueueFullError,
    Request,
)
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.interface import Run
from laguna_serve.plugins.diffusion.proposing.shapes import Chain
from laguna_serve.plugins.diffusion.proposing.sources import Drafted
from laguna_serve.plugins.diffusion.speculation import Decoder

TIMEOUT_S = 60.0


class Stream:
    """What a request was told, for another thread to read."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def read_end(self) -> tuple[tuple[int, ...], Finished]:
        """All tokens, and how it ended."""
        tokens: tuple[int, ...] = ()
        while isinstance(event := self.events.get(timeout=TIMEOUT_S), Committed):
            tokens += event.tokens
        return tokens, event


class Gate:
    """Lets passes through one by one, or all; each pass waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.open = False
        advance = Decoder.advance

        def gated(decoder: Decoder, runs: list[Run], *, alone: bool = False) -> None:
            if not self.open:
                self.entered.release()
                assert self.let.acquire(timeout=TIMEOUT_S)
            advance(decoder, runs, alone=alone)

        monkeypatch.setattr(Decoder, "advance", gated)

    def wait(self) -> None:
        """Until a pass is about to begin."""
        assert self.entered.acquire(timeout=TIMEOUT_S)

    def free(self) -> None:
        """From now on passes do not wait."""
        self.open = True
        self.let.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@contextmanager
def serving(
    decoder: Decoder | None = None,
    *,
    running: int = 16,
    waiting: int = 64,
    tokens: int | None = None,
    positions: int | None = None,
    on_death: Callable[[], None] | None = None,
) -> Iterator[Engine]:
    decoder = decoder or make_decoder("dual", Chain(make_drafted()))
    metrics = EngineMetrics("toy", speculates=decoder.speculation is not None)
    limits = Limits(
        sequence=160,
        vocabulary=VOCABULARY,
        running=running,
        waiting=waiting,
        tokens=tokens,
        open_positions=positions,
    )
    engine = Engine(decoder, metrics, limits, on_death=on_death)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert engine.join(TIMEOUT_S)


def make_drafted() -> Drafted:
    return Drafted(Predictor(make_model(1), "dual"))


def read(engine: Engine, name: str, **labels: str) -> float:
    value = engine.metrics.registry.get_sample_value(f"vllm:{name}", {"model_name": "toy", "engine": "0", **labels})
    assert value is not None
    return value


def submit(engine: Engine, *requests: Request) -> list[Stream]:
    streams = [Stream() for _ in requests]
    for request, stream in zip(requests, streams, strict=True):
        engine.submit(request, stream.events.put)
    return streams


@pytest.mark.slow
def test_sixteen_unlike_requests_and_their_counters() -> None:
    requests = draw_requests(16, "dual", seed=7)
    with serving(running=6) as engine:
        ends = [stream.read_end() for stream in submit(engine, *requests)]
        expected = [decode_alone(request) for request in requests]
        assert [tokens for tokens, _ in ends] == expected
        assert read(engine, "num_requests_running") == read(engine, "num_requests_waiting") == 0
        assert read(engine, "prompt_tokens_total") == sum(len(request.canvas.prompt) for request in requests)
        assert read(engine, "generation_tokens_total") == sum(map(len, expected))
        assert read(engine, "time_to_first_token_seconds_count") == 16
        for reason in ("stop", "length"):
            count = sum(end.reason == reason for _, end in ends)
            assert read(engine, "request_success_total", finished_reason=reason) == count
        steps, drafts = (
            read(engine, "diffusion_num_denoising_steps_total"),
            read(engine, "spec_decode_num_drafts_total"),
        )
        assert drafts + read(engine, "spec_decode_num_accepted_tokens_total") == steps
        assert b"vllm:e2e_request_latency_seconds_bucket" in engine.metrics.render()


@pytest.mark.slow
def test_a_thousand_aborted_requests_leave_nothing() -> None:
    decoder = make_decoder("dual", Chain(draft := make_drafted()))
    (request,) = draw_requests(1, "dual")
    with serving(decoder, running=8, waiting=1000) as engine:
        for batch in range(20):
            streams = [Stream() for _ in range(50)]
            handles = [engine.submit(request, stream.events.put) for stream in streams]
            if batch % 2:
                streams[0].events.get(timeout=TIMEOUT_S)  # it runs, others wait
            for handle in handles:
                handle.cancel()
            for number, stream in enumerate(streams):
                assert stream.read_end()[1].reason == "abort" or (batch % 2 and number < 8)
        (stream,) = submit(engine, request)
        assert stream.read_end()[0] == decode_alone(request)
        assert read(engine, "num_requests_running") == read(engine, "num_requests_waiting") == 0
        assert read(engine, "e2e_request_latency_seconds_count") == 1001
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) is Run]
        assert not draft._slots


def test_an_abort_ends_before_the_next_pass(gate: Gate) -> None:
    one, other = draw_requests(2, "dual", seed=9)
    with serving() as engine:
        stream = Stream()
        handle = engine.submit(one, stream.events.put)
        gate.wait()
        (kept,) = submit(engine, other)
        handle.cancel()
        gate.let.release()
        gate.wait()  # the pass after, without it
        assert stream.read_end()[1] == Finished("abort")
        assert read(engine, "num_requests_running") == 1
        gate.free()
        assert kept.read_end()[0] == decode_alone(other)


def test_the_queue_is_bounded(gate: Gate) -> None:
    requests = draw_requests(5, "dual", seed=10)
    with serving(running=1, waiting=2) as engine:
        streams = submit(engine, requests[0])
        gate.wait()
        second = Stream()
        handle = engine.submit(requests[1], second.events.put)
        streams += submit(engine, requests[2])
        assert read(engine, "num_requests_waiting") == 2
        with pytest.raises(QueueFullError, match="at most 2 requests"):
            submit(engine, requests[3])
        handle.cancel()
        assert second.read_end() == ((), Finished("abort"))
        streams += submit(engine, requests[4])  # its place is free at once
        gate.free()
        expected = [decode_alone(requests[number]) for number in (0, 2, 4)]
        assert [stream.read_end()[0] for stream in streams] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "refusal"),
    [
        ({"tokens": 30}, "expected at most 30 tokens of prompt and canvas, got 4 and 32"),
        ({"positions": 20}, "block_length: expected at most 20, whose logits have room in memory, got 32; lower it"),
    ],
)
def test_admission_keeps_to_the_room(gate: Gate, room: dict[str, int], refusal: str) -> None:
    """Twelve tokens each in room for thirty, or blocks of eight in room for twenty: two at a time, in their order."""
    requests = [Request(Canvas((7, 8, 9, 10 + n), 8, 8, MASK), Reference(cache="dual")) for n in range(5)]
    with serving(**room) as engine:  # type: ignore[arg-type]
        streams = submit(engine, *requests)
        gate.wait()
        gate.let.release()
        gate.wait()
        assert (read(engine, "num_requests_running"), read(engine, "num_requests_waiting")) == (2, 3)
        gate.free()
        assert [stream.read_end()[0] for stream in streams] == [decode_alone(request) for request in requests]
        with pytest.raises(DiffusionError, match=refusal):
            submit(engine, Request(Canvas((7, 8, 9, 10), 32, 32, MASK), Reference(cache="dual")))


def test_draining_finishes_what_is_there(gate: Gate) -> None:
    requests = draw_requests(4, "dual", seed=11)
    with serving(running=2) as engine:
        streams = submit(engine, *requests[:3])
        gate.wait()
        engine.drain()
        with pytest.raises(EngineStoppedError, match="being stopped"):
            submit(engine, requests[3])
        gate.free()
        assert [stream.read_end()[0] for stream in streams] == [decode_alone(request) for request in requests[:3]]
        assert engine.join(TIMEOUT_S)
        assert engine.cause is None


def test_stopping_ends_what_is_there(gate: Gate) -> None:
    with serving(running=1) as engine:
        streams = submit(engine, *[Request(Canvas((7, 8), 8, 8, MASK), Reference(cache="dual"))] * 3)
        gate.wait()
        engine.stop()
        gate.free()
        assert [stream.read_end()[1] for stream in streams] == [Finished("abort")] * 3
        assert engine.join(TIMEOUT_S)
        assert engine.cause is None


def test_a_listener_that_raises_ends_its_own_request() -> None:
    one, other = draw_requests(2, "dual", seed=12)

    def raising(event: Event) -> None:
        raise RuntimeError("the client's loop is closed")

    with serving() as engine:
        engine.submit(one, raising)
        (stream,) = submit(engine, other)
        assert stream.read_end()[0] == decode_alone(other)


def test_death_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("nothing is left")

    monkeypatch.setattr("laguna_serve.plugins.diffusion.engine.batch.MAX_FAILED", 1)
    monkeypatch.setattr(Predictor, "predict", failing)
    died = threading.Event()
    requests = draw_requests(3, "dual")
    with serving(running=1, on_death=died.set) as engine:
        streams = []
        for request in requests:
            streams += [Stream()]
            try:
                engine.submit(request, streams[-1].events.put)
            except EngineStoppedError:
                streams.pop()
        assert {stream.read_end()[1] for stream in streams} == {Finished("error", "MemoryError: nothing is left")}
        assert died.wait(TIMEOUT_S)
        assert engine.join(TIMEOUT_S)
        assert engine.cause == "MemoryError: nothing is left"
        with pytest.raises(EngineStoppedError, match="nothing is left"):
            submit(engine, requests[0])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(Canvas((7,), 4, 4, MASK), Reference()), "request: expected cache dual, guidance 0.0"),
        (Request(Canvas((7,) * 160, 4, 4, MASK), Reference(cache="dual")), "at most 160 tokens of prompt and canvas"),
        (Request(Canvas((7, 100), 4, 4, MASK), Reference(cache="dual")), "prompt: expected ids from 0 to 99"),
    ],
)
def test_what_cannot_be_served_is_refused(request_: Request, message: str) -> None:
    with serving() as engine, pytest.raises(DiffusionError, match=message):
        submit(engine, request_)
