"""Exactness of speculation: every proposer, every reference, a hostile proposer too; and defects that are caught."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusion_models import Adversary, Oracle, make_canvases, make_draft, make_model

from laguna_serve.plugins.diffusion import predictor as predictors
from laguna_serve.plugins.diffusion.calibration import calibrate
from laguna_serve.plugins.diffusion.decoding import reference as references
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import (
    Evenly,
    PerStep,
    Ranking,
    Reference,
    Threshold,
    rank,
)
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor
from laguna_serve.plugins.diffusion.proposing import interface
from laguna_serve.plugins.diffusion.proposing.budget import share_rows
from laguna_serve.plugins.diffusion.proposing.graph import Graph, choose_nodes, trace_path
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Proposer, Run
from laguna_serve.plugins.diffusion.proposing.order import Ordered, OrderModel
from laguna_serve.plugins.diffusion.proposing.shapes import Chain, Sequential, Spread, Union
from laguna_serve.plugins.diffusion.proposing.sources import Corrected, Drafted, Stale
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation

GRAPH = Graph(((0,), (0, 1), (1,), (0, 1, 2), (0, 2)), (0.6, 0.4, 0.2, 0.15, 0.1))
TARGET = make_model()
DRAFT = make_draft(TARGET)
torch.manual_seed(0)
ORDER = OrderModel(TARGET.embedding.weight).eval().requires_grad_(False)
CANVASES = make_canvases(3)
REFERENCES = {
    "r1": Reference(),
    "r2-dual": Reference(PerStep(2), cache="dual"),
    "threshold-dual": Reference(Threshold(0.5), cache="dual"),
    "threshold": Reference(Threshold(0.5)),
    "evenly-prefix-guided": Reference(Evenly(5), guidance=1.0, cache="prefix"),
    "r1-dual-warm": Reference(temperature=0.8, seed=3, cache="dual"),
    "r1-warm-guided": Reference(temperature=0.8, seed=4, guidance=0.5),
}


def make_proposer(name: str, reference: Reference) -> Proposer:
    draft = Drafted(Predictor(DRAFT, reference.cache, reference.guidance))
    made: dict[str, Callable[[], Proposer]] = {
        "chain": lambda: Chain(Stale()),
        "graph": lambda: Spread(Stale(), GRAPH),
        "draft": lambda: Spread(draft, GRAPH),
        "corrected": lambda: Spread(Corrected(draft), GRAPH),
        "sequential": lambda: Sequential(draft, cost=0.1),
        "ordered": lambda: Ordered(ORDER),
        "union": lambda: Union(Spread(Stale(), GRAPH), Chain(draft)),
        "adversary": Adversary,
        "union-adversary": lambda: Union(Adversary(), Chain(Stale())),
    }
    return made[name]()


PROPOSERS = (
    *("chain", "graph", "draft", "corrected", "sequential", "ordered", "union", "adversary", "union-adversary"),
)


def decode_alone(reference: Reference, canvases: list[Canvas]) -> list[Run]:
    """Each canvas by itself, without proposals."""
    return [Decoder(Predictor(TARGET), reference).decode([canvas])[0] for canvas in canvases]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Run]]:
    return {name: decode_alone(reference, CANVASES) for name, reference in REFERENCES.items()}


def speculate(reference: Reference, proposer: Proposer, states: int = 3, rows: int | None = None) -> list[Run]:
    return Decoder(Predictor(TARGET), reference, (), Speculation(proposer, states, rows)).decode(CANVASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_token_is_the_references(expected: dict[str, list[Run]], name: str, proposer: str) -> None:
    reference = REFERENCES[name]
    runs = speculate(reference, make_proposer(proposer, reference))
    for run, alone in zip(runs, expected[name], strict=True):
        assert run.state == alone.state
        assert run.steps == alone.steps
        assert run.passes <= alone.passes
        assert run.passes + run.accepted == run.steps


@pytest.mark.slow
def test_a_crowd_gets_what_each_gets_alone(expected: dict[str, list[Run]]) -> None:
    for name in ("r1", "r1-dual-warm"):
        together = Decoder(Predictor(TARGET), REFERENCES[name]).decode(CANVASES)
        assert [run.state for run in together] == [run.state for run in expected[name]]


def test_hostile_proposals_change_nothing(expected: dict[str, list[Run]]) -> None:
    runs = speculate(REFERENCES["r1-dual-warm"], Adversary())
    assert [run.state for run in runs] == [run.state for run in expected["r1-dual-warm"]]
    assert sum(run.proposed for run in runs)


def walk(reference: Reference, canvas: Canvas) -> list[State]:
    """The reference's states from the first to the last."""
    decoder, run = Decoder(Predictor(TARGET), reference), Run.begin(canvas, reference)
    states = [run.state]
    while run.find_end() is None:
        decoder.advance([run])
        states.append(run.state)
    return states


@pytest.mark.parametrize(("cache", "passes"), [("none", 4), ("dual", 6)])
def test_foresight_is_worth_its_states(cache: references.Cache, passes: int) -> None:
    """16 steps with three states ahead: 4 in a pass; with a cache two passes open blocks, and 7 are left of each."""
    reference = Reference(cache=cache)
    paths = {canvas: walk(reference, canvas) for canvas in CANVASES}
    runs = speculate(reference, Oracle(paths))
    assert [run.state for run in runs] == [paths[canvas][-1] for canvas in CANVASES]
    assert [run.passes for run in runs] == [passes] * 3


def test_states_that_are_met_in_another_order_count() -> None:
    """Membership decides: the same states, proposed from the last to the first."""
    paths = {canvas: walk(Reference(), canvas) for canvas in CANVASES}
    oracle = Oracle(paths)

    class Backwards:
        def propose(self, runs: list[Run], most: int) -> list[list[Proposal]]:
            return [proposals[::-1] for proposals in oracle.propose(runs, most)]

    assert [run.passes for run in speculate(Reference(), Backwards())] == [4] * 3


def test_an_end_stops_a_run_early(expected: dict[str, list[Run]]) -> None:
    answer = expected["r1"][0].state
    stop = {answer[5]}
    first = answer.index(answer[5]) + 1
    for proposer in (None, Speculation(make_proposer("chain", Reference()), 3)):
        decoder = Decoder(Predictor(TARGET), Reference(), stop, proposer)
        run = decoder.decode(CANVASES[:1])[0]
        assert run.find_end() == first
        assert run.state[:first] == answer[:first]
        assert run.steps <= 16


# Each of these plants a defect, and the comparison of tokens above has to notice.


def differs(name: str, proposer: Proposer, expected: dict[str, list[Run]]) -> bool:
    runs = speculate(REFERENCES[name], proposer)
    return [run.state for run in runs] != [run.state for run in expected[name]]


@pytest.mark.slow
def test_a_state_accepted_without_membership_is_caught(
    expected: dict[str, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk goes on with the logits of a state of as many tokens, whichever it is."""

    class Lenient(dict[State, torch.Tensor]):
        def __contains__(self, state: object) -> bool:
            return self._nearest(state) is not None

        def __getitem__(self, state: State) -> torch.Tensor:
            nearest = self._nearest(state)
            assert nearest is not None
            return super().__getitem__(nearest)

        def _nearest(self, state: object) -> State | None:
            assert isinstance(state, tuple)
            if dict.__contains__(self, state):
                return state
            return next((known for known in self if known.count(3) == state.count(3)), None)

    whole = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, asks: [Lenient(found) for found in whole(self, asks)])
    assert differs("r1-warm-guided", make_proposer("chain", REFERENCES["r1-warm-guided"]), expected)


def test_a_stale_block_cache_is_caught(expected: dict[str, list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's surroundings are those of the block before, as if its opening pass had kept nothing."""

    def keep_first(self: Predictor, ask: Ask, state: State, sides: list[predictors.RowOutput]) -> None:
        stale = ask.slot.contexts
        keep(self, ask, state, sides)
        if stale:
            ask.slot.contexts = stale

    keep = Predictor._keep
    monkeypatch.setattr(Predictor, "_keep", keep_first)
    assert differs("r2-dual", make_proposer("chain", REFERENCES["r2-dual"]), expected)


@pytest.mark.slow
def test_another_rule_for_ties_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Confidences are rounded so that there are ties; then the highest position wins where the lowest should."""

    def rounded(rightmost: bool) -> Callable[..., Ranking]:
        def ranked(canvas: Canvas, reference: Reference, state: State, logits: torch.Tensor) -> Ranking:
            found = rank(canvas, reference, state, logits)
            sign = -1 if rightmost else 1
            values = found.confidences.round()
            order = sorted(range(len(values)), key=lambda n: (-float(values[n]), sign * found.positions[n]))
            picked = [found.positions[n] for n in order], [found.tokens[n] for n in order]
            return Ranking(tuple(picked[0]), tuple(picked[1]), values[order])

        return ranked

    texts = []
    for rightmost in (False, True):
        monkeypatch.setattr(references, "rank", rounded(rightmost))
        texts.append([run.state for run in speculate(Reference(), Chain(Stale()))])
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_noise_by_time_is_caught(expected: dict[str, list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that counts its calls instead of the masks that are left."""
    calls = itertools.count()
    draw = references.draw_gumbel
    monkeypatch.setattr(
        references,
        "draw_gumbel",
        lambda seed, at, left, size, device: draw(seed, at, next(calls), size, device),
    )
    assert differs("r1-dual-warm", make_proposer("chain", REFERENCES["r1-dual-warm"]), expected)


def test_a_step_on_another_states_logits_is_caught(
    expected: dict[str, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a pass uses the logits of its first state."""
    first: dict[int, torch.Tensor] = {}

    def reuse(canvas: Canvas, reference: Reference, state: State, logits: torch.Tensor) -> State:
        kept = first.setdefault(id(canvas), logits) if state.count(3) % 3 else logits
        first[id(canvas)] = kept
        return references.step(canvas, reference, state, kept)

    monkeypatch.setattr(interface, "step", reuse)
    assert differs("r1", make_proposer("chain", REFERENCES["r1"]), expected)


def test_rows_are_shared_by_chance() -> None:
    runs = [Run.begin(canvas) for canvas in CANVASES[:2]]
    states = [tuple(run.canvas.commit(run.state, {at: 9}) for at in range(3)) for run in runs]
    proposals = [
        [Proposal(states[0][0], 0.9), Proposal(states[0][1], 0.2), Proposal(states[0][0], 0.9)],
        [Proposal(states[1][0], 0.5), Proposal(states[1][1], 0.4), Proposal(runs[1].state, 1.0)],
    ]
    shared = share_rows(runs, proposals, 30, lambda run, state: 10)
    assert shared == [[states[0][0]], [states[1][0], states[1][1]]]
    assert share_rows(runs, proposals, 9, lambda run, state: 10) == [[], []]


def test_a_budget_of_rows_bounds_a_pass(expected: dict[str, list[Run]]) -> None:
    reference = REFERENCES["r2-dual"]
    predictor = Predictor(TARGET)
    speculation = Speculation(Adversary(random.Random(2)), 8, rows=16)
    decoder = Decoder(predictor, reference, (), speculation)
    runs = [decoder.begin(canvas) for canvas in CANVASES]
    decoder.advance(runs)
    while going := [run for run in runs if run.find_end() is None]:
        most = sum(predictor.count_rows(run.canvas, run.state) for run in going) + 16
        before = predictor.rows
        decoder.advance(going)
        assert predictor.rows - before <= most
    assert [run.state for run in runs] == [run.state for run in expected["r2-dual"]]


def test_nodes_are_chosen_by_the_paths_that_come_by() -> None:
    paths = [[(0,), (0, 1)]] * 5 + [[(1,), (0, 1)]] * 3 + [[(0,), (0, 2)]] * 2
    graph = choose_nodes(paths, 3)
    assert graph.nodes == ((0,), (0, 1), (1,))
    assert graph.chances == (0.7, 0.5, 0.3)
    assert len(choose_nodes(paths, 9).nodes) == 4
    assert choose_nodes([[]], 3) == Graph((), ())


def test_paths_are_sets_of_ranks() -> None:
    canvas = Canvas((7,), 4, 4, 3)
    start = canvas.start()
    ranking = Ranking((2, 0, 3, 1), (9, 8, 7, 6), torch.zeros(4))
    followers = [canvas.commit(start, {2: 9}), canvas.commit(start, {2: 9, 3: 7}), canvas.commit(start, {2: 9, 3: 5})]
    assert trace_path(start, ranking, followers) == [(0,), (0, 2)]


def test_a_graph_is_kept_in_a_file(tmp_path: Path) -> None:
    GRAPH.save(tmp_path / "graph.json")
    assert Graph.load(tmp_path / "graph.json") == GRAPH
    for content in ("{}", '{"nodes": [[0]], "chances": []}', '{"nodes": [[]], "chances": [1]}', "no"):
        (tmp_path / "graph.json").write_text(content)
        with pytest.raises(DiffusionError, match="calibrate again"):
            Graph.load(tmp_path / "graph.json")


@pytest.mark.slow
def test_a_graph_is_counted_on_the_reference() -> None:
    """By a source that is the target itself the first rank is always next; chances fall, and no node lacks its way."""
    exact = Drafted(Predictor(TARGET))
    graph = calibrate(Decoder(Predictor(TARGET), Reference()), exact, CANVASES[:2], 4)
    assert graph.nodes[0] == (0,)
    assert graph.chances[0] == 1.0
    assert list(graph.chances) == sorted(graph.chances, reverse=True)
    assert all(any(set(way) < set(node) for way in graph.nodes) for node in graph.nodes if len(node) > 1)
    runs = speculate(Reference(), Spread(exact, graph))
    assert sum(run.passes for run in runs) < sum(run.steps for run in runs)
