"""Whether proposals pay: by a clock of its own, that counts what each pass computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from diffusion_models import Oracle, make_canvases, make_model

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Run
from laguna_serve.plugins.diffusion.proposing.shapes import Chain
from laguna_serve.plugins.diffusion.proposing.sources import Stale
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation
from laguna_serve.plugins.diffusion.trial import Trial, try_speculation

TARGET = make_model()
CANVASES = make_canvases(2)
REFERENCE = Reference(cache="dual")


def count_time(predictor: Predictor, row_s: float, pass_s: float) -> Callable[[], float]:
    """A clock on which a row and a pass take so long."""
    return lambda: predictor.rows * row_s + predictor.passes * pass_s


def walk(canvas: Canvas) -> list[State]:
    decoder = Decoder(Predictor(TARGET), REFERENCE)
    run = decoder.begin(canvas)
    states = [run.state]
    while run.find_end() is None:
        decoder.advance([run])
        states.append(run.state)
    return states


@pytest.mark.slow
def test_foresight_pays_where_rows_are_free_and_not_where_they_cost() -> None:
    speculation = Speculation(Oracle({canvas: walk(canvas) for canvas in CANVASES}), states=3)
    predictor = Predictor(TARGET)
    free = try_speculation(predictor, REFERENCE, speculation, CANVASES, 400, count_time(predictor, 0, 1))
    # 8 steps of a block in 1 pass that opens it and 2 that take four.
    assert free.pays
    assert free.steps_per_pass == pytest.approx(8 / 3, abs=0.05)
    assert free.speedup == pytest.approx(8 / 3, abs=0.05)
    # A state's rows are computed either way: foresight saves no row.
    dear = try_speculation(predictor, REFERENCE, speculation, CANVASES, 40_000, count_time(predictor, 1, 0))
    assert dear.speedup == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_proposals_that_are_never_met_do_not_pay() -> None:
    class Useless(Chain):
        """The chain without its first state: no other is come by before it."""

        def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
            return [proposals[1:] for proposals in super().propose(runs, most + 1)]

    predictor = Predictor(TARGET)
    trial = try_speculation(
        predictor, REFERENCE, Speculation(Useless(Stale()), 3), CANVASES, 4000, count_time(predictor, 1, 0)
    )
    assert not trial.pays
    assert str(Trial(0.5, 1.0)) == "0.50 times as fast as without, 1.00 steps per pass"


def test_counters_are_left_as_they_were() -> None:
    predictor = Predictor(TARGET)
    predictor.passes, predictor.rows = 7, 70
    times = iter(range(10_000))
    try_speculation(predictor, REFERENCE, Speculation(Chain(Stale()), 2), CANVASES, 8, lambda: float(next(times)))
    assert (predictor.passes, predictor.rows) == (7, 70)
