"""Which states are proposed, given estimated logits: a chain of steps, or a calibrated graph of sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import State
from laguna_serve.plugins.diffusion.decoding.reference import PerStep, Reference, Threshold, rank
from laguna_serve.plugins.diffusion.proposing.graph import Graph
from laguna_serve.plugins.diffusion.proposing.interface import Proposal, Proposer, Run
from laguna_serve.plugins.diffusion.proposing.sources import Drafted, Source

Step = tuple[State, float]


def pace(reference: Reference) -> Reference:
    """Return the reference that proposals step by.

    It is the target's, but for a threshold: estimates that are a little off pass or miss it in other numbers, and a
    state with one token less is passed by more often than one with the wrong number.
    """
    return replace(reference, schedule=PerStep()) if isinstance(reference.schedule, Threshold) else reference


def take_step(run: Run, reference: Reference, state: State, logits: torch.Tensor) -> Step:
    """Take a step from a state of the run by estimated logits; with the chance that its tokens have by themselves."""
    ranking = rank(run.canvas, reference, state, logits)
    count = reference.schedule.count(ranking.confidences, run.canvas.block_length)
    tokens = dict(zip(ranking.positions[:count], ranking.tokens[:count], strict=True))
    return run.canvas.commit(state, tokens), math.exp(float(ranking.confidences[:count].sum()))


class Chain:
    """Steps one after the other, all by the logits that a source estimates for the current state."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose up to `most` steps for each run; chances are products of the tokens' probabilities."""
        return [
            [] if logits is None else self._follow(run, logits, most)
            for run, logits in zip(runs, self.source.estimate(runs), strict=True)
        ]

    def _follow(self, run: Run, logits: torch.Tensor, most: int) -> list[Proposal]:
        state, chance, reference = run.state, 1.0, pace(run.reference)
        block = run.canvas.find_block(state)
        proposals: list[Proposal] = []
        while len(proposals) < most:
            state, step_chance = take_step(run, reference, state, logits)
            if run.canvas.find_block(state) != block:
                break
            chance *= step_chance
            proposals.append(Proposal(state, chance))
        return proposals


class Spread:
    """The nodes of a calibrated graph, ranked by the logits that a source estimates for the current state."""

    def __init__(self, source: Source, graph: Graph) -> None:
        self.source = source
        self.graph = graph

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose the first nodes for each run, those for which enough positions are open."""
        return [
            [] if logits is None else self._spread(run, logits, most)
            for run, logits in zip(runs, self.source.estimate(runs), strict=True)
        ]

    def _spread(self, run: Run, logits: torch.Tensor, most: int) -> list[Proposal]:
        ranking = rank(run.canvas, run.reference, run.state, logits)
        open_ = len(ranking.positions)
        proposals: list[Proposal] = []
        for node, chance in zip(self.graph.nodes, self.graph.chances, strict=True):
            # A state without a mask in this block is of the next one, or none.
            if len(proposals) < most and node[-1] < open_ and len(node) < open_:
                proposals.append(Proposal(self._reach(run, logits, [ranking.positions[r] for r in node]), chance))
        return proposals

    def _reach(self, run: Run, logits: torch.Tensor, positions: Sequence[int]) -> State:
        """Commit the positions in turn: with a temperature each token depends on how many masks are left."""
        state = run.state
        for at in positions:
            ranking = rank(run.canvas, run.reference, state, logits)
            state = run.canvas.commit(state, {at: ranking.tokens[ranking.positions.index(at)]})
        return state


class Sequential:
    """Steps of the draft, each by its own pass, while the chance of being right so far exceeds `cost`.

    Attributes:
        cost: of a pass of the draft, as a share of the target's; 0 drafts as many as there is room for.
    """

    def __init__(self, draft: Drafted, cost: float = 0.0) -> None:
        self.draft = draft
        self.cost = cost

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose up to `most` steps for each run; chances are products of the tokens' probabilities."""
        proposals: dict[Run, list[Proposal]] = {run: [] for run in runs}
        going = {run: Proposal(run.state, 1.0) for run in runs}
        for _ in range(most):
            answers = self.draft.predict([(run, [at.state]) for run, at in going.items()])
            taken = {}
            for (run, at), answer in zip(going.items(), answers, strict=True):
                state, chance = take_step(run, pace(run.reference), at.state, answer[at.state])
                if at.chance * chance > self.cost and run.canvas.find_block(state) == run.canvas.find_block(run.state):
                    taken[run] = Proposal(state, at.chance * chance)
                    proposals[run].append(taken[run])
            going = taken
            if not going:
                break
        return [proposals[run] for run in runs]


class Union:
    """What several proposers propose; a state that more than one has, with its best chance."""

    def __init__(self, *proposers: Proposer) -> None:
        self.proposers = proposers

    def propose(self, runs: Sequence[Run], most: int) -> list[list[Proposal]]:
        """Propose the likeliest of all states that are proposed for a run."""
        offered = [proposer.propose(runs, most) for proposer in self.proposers]
        return [self._merge([of_run[number] for of_run in offered], most) for number in range(len(runs))]

    def _merge(self, offered: list[list[Proposal]], most: int) -> list[Proposal]:
        best: dict[State, float] = {}
        for proposal in (proposal for proposals in offered for proposal in proposals):
            best[proposal.state] = max(proposal.chance, best.get(proposal.state, 0.0))
        merged = [Proposal(state, chance) for state, chance in best.items()]
        return sorted(merged, key=lambda proposal: -proposal.chance)[:most]
