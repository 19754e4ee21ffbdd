"""Requests that come and go at any pass, of unlike lengths, blocks and settings: each gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from diffusion_models import MASK, VOCABULARY, Adversary, make_draft, make_model

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Cache, Evenly, PerStep, Reference, Schedule, Threshold
from laguna_serve.plugins.diffusion.engine.batch import MAX_FAILED, Batch, Job
from laguna_serve.plugins.diffusion.engine.requests import Request
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing import interface
from laguna_serve.plugins.diffusion.proposing.interface import Proposer, Run
from laguna_serve.plugins.diffusion.proposing.shapes import Chain, Union
from laguna_serve.plugins.diffusion.proposing.sources import Corrected, Drafted, Stale
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation

TARGET = make_model()
DRAFT = make_draft(TARGET)
SCHEDULES: tuple[Schedule, ...] = (PerStep(1), PerStep(3), Evenly(3), Threshold(0.4))


def draw_requests(count: int, cache: Cache, seed: int = 0) -> list[Request]:
    """Unlike in everything that a request may choose."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        block = rng.choice((2, 4, 8))
        canvas = Canvas(
            tuple(rng.randrange(5, VOCABULARY) for _ in range(rng.randrange(2, 20))),
            block * rng.randrange(1, 4),
            block,
            MASK,
        )
        reference = Reference(rng.choice(SCHEDULES), rng.choice((0.0, 0.7)), seed=number, cache=cache, guidance=0.0)
        stop = frozenset(rng.sample(range(5, VOCABULARY), 12))
        requests.append(Request(canvas, reference, stop, rng.choice((None, canvas.length - 1))))
    return requests


def decode_alone(request: Request) -> tuple[int, ...]:
    """By the offline decode, without company and proposals."""
    decoder = Decoder(Predictor(TARGET), request.reference, request.stop)
    (run,) = decoder.decode([request.canvas])
    end = run.find_end()
    assert end is not None
    return run.state[: end if request.limit is None else min(end, request.limit)]


def make_decoder(cache: Cache, proposer: Proposer | None = None, rows: int | None = None) -> Decoder:
    speculation = None if proposer is None else Speculation(proposer, 3, rows)
    return Decoder(Predictor(TARGET), Reference(cache=cache), (), speculation)


@dataclass
class Crowd:
    """Adds requests to a batch and takes some out at passes that are drawn."""

    batch: Batch
    rng: random.Random
    answers: dict[Request, list[int]] = field(default_factory=dict)
    ended: dict[Request, str] = field(default_factory=dict)
    most: int = 0

    def play(self, requests: list[Request], leaving: set[Request]) -> None:
        waiting, jobs = list(requests), dict[Request, Job]()
        while waiting or self.batch.jobs:
            for _ in range(self.rng.randrange(2, 6)):
                if waiting:
                    request = waiting.pop()
                    jobs[request] = self.batch.add(request)
            gone = [r for r, job in jobs.items() if r in leaving and job in self.batch.jobs and self.rng.random() < 0.3]
            for request in gone:
                self.batch.remove(jobs[request])
            self.most = max(self.most, len(self.batch.jobs))
            for advance in self.batch.advance():
                self.answers.setdefault(advance.job.request, []).extend(advance.tokens)
                if advance.reason is not None:
                    self.ended[advance.job.request] = advance.reason


@pytest.mark.slow
@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_crowd_that_comes_and_goes(cache: Cache, speculates: bool) -> None:
    proposer = Union(Chain(Stale()), Chain(Corrected(Drafted(Predictor(DRAFT, cache))))) if speculates else None
    requests = draw_requests(16, cache)
    leaving = set(requests[::4])
    crowd = Crowd(Batch(make_decoder(cache, proposer, rows=64)), random.Random(1))
    crowd.play(list(requests), leaving)
    assert crowd.most >= 8
    assert set(requests) - leaving <= crowd.ended.keys()
    for request, reason in crowd.ended.items():
        answer = tuple(crowd.answers[request])
        assert answer == decode_alone(request)
        assert reason == ("stop" if answer[-1] in request.stop else "length")
    assert {"stop", "length"} == set(crowd.ended.values())
    assert bool(crowd.batch.totals.accepted) == speculates


@pytest.mark.slow
def test_hostile_proposals_in_a_crowd() -> None:
    requests = draw_requests(8, "dual", seed=3)
    crowd = Crowd(Batch(make_decoder("dual", Adversary())), random.Random(2))
    crowd.play(list(requests), set())
    assert {request: tuple(answer) for request, answer in crowd.answers.items()} == {
        request: decode_alone(request) for request in requests
    }


def test_tokens_are_given_out_before_the_end() -> None:
    """As soon as there is no gap before them; a block of eight has more passes than its first tokens."""
    request = Request(Canvas((7, 8, 9), 16, 8, MASK), Reference())
    batch = Batch(make_decoder("none"))
    batch.add(request)
    seen = []
    while batch.jobs:
        seen += [len(advance.tokens) for advance in batch.advance()]
    assert sum(seen) == 16
    assert any(seen[: len(seen) // 2])


def test_totals_are_of_all_requests() -> None:
    requests = [replace(request, stop=frozenset(), limit=None) for request in draw_requests(3, "none")]
    batch = Batch(make_decoder("none", Chain(Stale())))
    for request in requests:
        batch.add(request)
    while batch.jobs:
        batch.advance()
    totals = batch.totals
    assert totals.committed == sum(request.canvas.length for request in requests)
    assert totals.visits + totals.accepted == totals.steps
    assert totals.positions == batch.decoder.predictor.rows
    assert totals.proposed


def fail_for(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the request with this seed raise."""

    def failing(canvas: Canvas, reference: Reference, state: tuple[int, ...], logits: torch.Tensor) -> object:
        if reference.seed == seed:
            raise RuntimeError("no such luck")
        return step(canvas, reference, state, logits)

    step = interface.step
    monkeypatch.setattr(interface, "step", failing)


def play(batch: Batch, requests: list[Request]) -> dict[Request, tuple[tuple[int, ...], str | None, str | None]]:
    """All of them to their ends: answer, reason and error."""
    for request in requests:
        batch.add(request)
    answers: dict[Request, tuple[int, ...]] = {}
    ends = {}
    while batch.jobs:
        for advance in batch.advance():
            request = advance.job.request
            answers[request] = answers.get(request, ()) + advance.tokens
            if advance.reason is not None:
                ends[request] = (answers[request], advance.reason, advance.error)
    return ends


def test_a_request_that_fails_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = draw_requests(5, "dual", seed=4)
    expected = {request: decode_alone(request) for request in requests}
    fail_for(2, monkeypatch)
    ends = play(Batch(make_decoder("dual", Chain(Stale()))), requests)
    assert ends.pop(requests[2]) == ((), "error", "RuntimeError: no such luck")
    assert {request: answer for request, (answer, _, _) in ends.items()} == {
        request: answer for request, answer in expected.items() if request in ends
    }
    assert len(ends) == 4


def test_a_proposer_that_fails_costs_speed_alone() -> None:
    class Broken:
        def propose(self, runs: list[Run], most: int) -> list[list[object]]:
            raise RuntimeError("out of ideas")

    requests = draw_requests(3, "none", seed=5)
    ends = play(Batch(make_decoder("none", Broken())), requests)  # type: ignore[arg-type]
    assert {request: answer for request, (answer, _, _) in ends.items()} == {r: decode_alone(r) for r in requests}


def test_what_fails_for_all_ends_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is gone fails every pass, whoever is in it."""

    def failing(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Predictor, "predict", failing)
    batch = Batch(make_decoder("none"))
    for number, request in enumerate(draw_requests(MAX_FAILED, "none"), 1):
        batch.add(request)
        if number == MAX_FAILED:
            with pytest.raises(RuntimeError, match="the device is gone"):
                batch.advance()
        else:
            assert [advance.reason for advance in batch.advance()] == ["error"]


MAKERS: list[Callable[[Reference], Reference]] = [
    lambda reference: replace(reference, cache="dual"),
    lambda reference: replace(reference, guidance=1.0),
]


@pytest.mark.parametrize("change", MAKERS)
def test_one_cache_and_guidance_for_all(change: Callable[[Reference], Reference]) -> None:
    batch = Batch(make_decoder("none"))
    canvas = Canvas((7,), 4, 4, MASK)
    batch.add(Request(canvas, change(Reference())))
    assert [advance.error for advance in batch.advance()] == ["AssertionError: one cache and one guidance"]
