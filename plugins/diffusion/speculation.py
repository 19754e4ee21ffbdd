"""Exact speculation: a pass evaluates more states than one, and the reference walks through those it comes by.

A state is left by the reference's own step alone, on logits that were computed for that very state. So by induction
every state on the way is the reference's, whatever was proposed, at every temperature; and as the current state is
always among those evaluated, no run takes more passes of the target than it has steps.

What a state must be is *in* the set: its place does not matter, and ways that commute meet in one state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.passes import MaskModel
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor
from laguna_serve.plugins.diffusion.proposing.budget import share_rows
from laguna_serve.plugins.diffusion.proposing.interface import Proposer, Run


@dataclass(frozen=True, slots=True)
class Speculation:
    """What is proposed, and how much of it.

    Attributes:
        states: per request and pass, beside the current one.
        rows: of all proposals of a pass; None bounds them by `states` alone.
    """

    proposer: Proposer
    states: int
    rows: int | None = None


@dataclass(slots=True)
class Decoder:
    """Takes runs forward, pass by pass, each along its own reference.

    Runs may come and go between passes, and be of unlike canvases, blocks and steps: none sees its company.

    Attributes:
        reference, stop: of the runs that it begins itself; their cache and guidance are those of every run.
        keeps: runs keep the logits of their last step, as proposals need them and who looks at runs may.
    """

    predictor: Predictor
    reference: Reference
    stop: Collection[int] = ()
    speculation: Speculation | None = None
    keeps: bool = True
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.predictor.cache = self.reference.cache
        self.predictor.guidance = self.reference.guidance
        if self.speculation is not None and isinstance(self.predictor.model, MaskModel):
            raise DiffusionError(
                "proposals: expected none for a model whose bits depend on its company; leave them out"
            )

    def begin(self, canvas: Canvas) -> Run:
        """Begin a canvas along the decoder's own reference."""
        return Run.begin(canvas, self.reference, self.stop)

    def advance(self, runs: Sequence[Run], *, alone: bool = False) -> None:
        """Take every run, none of them finished, at least one step forward in one pass of the target.

        Args:
            runs: their references have the decoder's cache and guidance.
            alone: without proposals, which change no text.
        """
        kinds = {(run.reference.cache, run.reference.guidance) for run in runs}
        assert kinds <= {(self.predictor.cache, self.predictor.guidance)}, "one cache and one guidance"
        proposals: list[list[State]] = [[] for _ in runs] if alone else self._propose(runs)
        asks = [Ask(run.canvas, run.slot, [run.state, *states]) for run, states in zip(runs, proposals, strict=True)]
        answers = self.predictor.predict(asks)
        self.passes += 1
        for run, states, logits in zip(runs, proposals, answers, strict=True):
            steps = run.steps
            while run.state in logits and run.find_end() is None:
                run.take_step(logits[run.state], keep=self.keeps)
            run.passes += 1
            run.proposed += len(states)
            run.accepted += run.steps - steps - 1

    def _propose(self, runs: Sequence[Run]) -> list[list[State]]:
        """Choose the states beside the current ones that share the pass."""
        chosen: list[list[State]] = [[] for _ in runs]
        open_ = [number for number, run in enumerate(runs) if not self.predictor.opens(run.canvas, run.state)]
        if self.speculation is None or not open_:
            return chosen
        usable = [runs[number] for number in open_]
        offered = self.speculation.proposer.propose(usable, self.speculation.states)
        proposals = [[p for p in ps if self._shares(run, p.state)] for run, ps in zip(usable, offered, strict=True)]
        costs = self.predictor.count_rows
        most = self.speculation.rows
        if most is None:
            most = sum(costs(run.canvas, p.state) for run, ps in zip(usable, proposals, strict=True) for p in ps)
        shared = share_rows(usable, proposals, most, lambda run, state: costs(run.canvas, state))
        for number, states in zip(open_, shared, strict=True):
            chosen[number] = states
        return chosen

    def _shares(self, run: Run, state: State) -> bool:
        """Say whether a state can share the pass of the run's current one; there is no error in proposing others."""
        canvas = run.canvas
        if len(state) != canvas.length or canvas.find_block(state) is None:
            return False
        of_block = canvas.begin_block(state) == canvas.begin_block(run.state)
        return self.predictor.cache == "none" or (of_block and not self.predictor.opens(canvas, state))

    def decode(self, canvases: Sequence[Canvas]) -> list[Run]:
        """Decode canvases together to their ends; as many passes as the longest needs."""
        runs = [self.begin(canvas) for canvas in canvases]
        while going := [run for run in runs if run.find_end() is None]:
            self.advance(going)
        return runs
