"""Where proposals' logits come from: the target's last pass, a draft model, or the one corrected by the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from laguna_serve.plugins.diffusion.decoding.canvas import State
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor, Slot
from laguna_serve.plugins.diffusion.proposing.interface import Run


class Source(Protocol):
    """Estimates the logits that the target would give."""

    def estimate(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Estimate each run's logits [block_length, vocabulary] of its state's open block; None where it cannot."""


class Stale:
    """The target's own logits of the state before. They cost nothing."""

    def estimate(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Give each run's last logits, where they are of the block that is open now."""
        return [run.find_stale() for run in runs]


class Drafted:
    """A smaller model's logits: one pass of it for all runs."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._slots: WeakKeyDictionary[Run, Slot] = WeakKeyDictionary()

    def predict(self, wanted: Sequence[tuple[Run, Sequence[State]]]) -> list[dict[State, torch.Tensor]]:
        """Compute the draft's logits of any states of the runs, those of a run in the same block."""
        asks = [Ask(run.canvas, self._slots.setdefault(run, Slot()), states) for run, states in wanted]
        return self.predictor.predict(asks)

    def estimate(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Compute the draft's logits of the runs' states."""
        answers = self.predict([(run, [run.state]) for run in runs])
        return [answer[run.state] for run, answer in zip(runs, answers, strict=True)]


class Corrected:
    """The target's last logits, moved by what the draft's change from that state to this one.

    Where the draft errs in the same way on both the error cancels.
    """

    def __init__(self, draft: Drafted) -> None:
        self.draft = draft

    def estimate(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Compute the draft's logits of two states of each run; None where the target's are of another block."""
        usable = [(run, run.last[0], stale) for run in runs if run.last and (stale := run.find_stale()) is not None]
        answers = self.draft.predict([(run, [before, run.state]) for run, before, _ in usable])
        moved = {
            id(run): stale + answer[run.state] - answer[before]
            for (run, before, stale), answer in zip(usable, answers, strict=True)
        }
        return [moved.get(id(run)) for run in runs]
