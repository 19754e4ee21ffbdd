"""Measuring scores: model and text opened, what it takes, the passes, and every score of their sums."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from laguna_serve.plugins.pruning import ExpertShape
from laguna_serve.scripts.text.rows import TextRows, read_rows
from laguna_serve.scripts.training.devices import require_device
from laguna_serve.scripts.training.pruning.artefacts import ScoresSource
from laguna_serve.scripts.training.pruning.plan import ScoringPlan
from laguna_serve.scripts.training.pruning.scores import SCORES, ExpertSums, find_constants, rank_mone, rank_reap
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.passes import Passes
from laguna_serve.scripts.training.pruning.streaming.sizes import make_plan
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.serving.checkpoint import read_config
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint
from laguna_serve.serving.machine.memory import GIB


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums of every sparse layer's experts over a text; `loss`: its mean loss, where gradients were taken."""

    layers: list[ExpertSums]
    text: TextRows
    loss: float | None
    plan: ScoringPlan

    @property
    def routed(self) -> npt.NDArray[np.float64] | None:
        """[L, E]: tokens routed to each expert; None where no text was read."""
        return np.stack([sums.tokens.numpy() for sums in self.layers]) if self.text.rows else None

    def scores(self, name: str) -> npt.NDArray[np.float32]:
        """[L, E, N]: a score, of those that the passes had everything for."""
        targets = max(1, self.text.targets)
        return torch.stack([SCORES[name].compute(sums, targets) for sums in self.layers]).float().numpy()

    def rank_experts(self, name: Literal["reap", "mone"]) -> npt.NDArray[np.float64]:
        """[L, E]: a score of whole experts."""
        targets = max(1, self.text.targets)
        found = [rank_reap(sums) if name == "reap" else rank_mone(sums, targets) for sums in self.layers]
        return torch.stack(found).numpy()

    def constants(self) -> npt.NDArray[np.float32]:
        """[L, E, H]: what MoNE puts in a pruned expert's place."""
        return torch.stack([find_constants(sums) for sums in self.layers]).float().numpy()

    def source(self, name: str) -> ScoresSource:
        """How it was measured, for the manifest."""
        source: ScoresSource = {"score": name, "dtype": self.plan.dtype, "device": self.plan.device}
        if self.text.rows:
            source |= {
                "text": self.text.source,
                "documents": self.text.documents,
                "rows": len(self.text.rows),
                "tokens": self.text.tokens,
            }
        if self.loss is not None:
            source["loss"] = self.loss
        return source


@dataclass(frozen=True, slots=True)
class Measurement:
    """A model and a text, ready to be measured."""

    folder: Path
    shape: ExpertShape
    layers: Layers
    text: TextRows
    score: str
    plan: ScoringPlan

    def run(self, work: Path) -> Measured:
        """Measure what the work folder lacks.

        Raises:
            RunDirError: it is another measurement's. CommandError: its disk is too full.
            CheckpointError, JournalError, WriteError: see `Passes.run`.
        """
        score = SCORES[self.score]
        if not score.needs_text:
            return Measured([self._weigh(layer) for layer in self.shape.layers], self.text, None, self.plan)
        self._check_room(work)
        folder = work / ("backward" if score.needs_gradients else "forward")
        claim_folder(folder, self._list_settings())
        passes = Passes(self.layers, self.shape, self.text, folder, score.needs_gradients, Progress())
        sums, loss = passes.run()
        return Measured(sums, self.text, loss, self.plan)

    def _check_room(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work).free + sum(path.stat().st_size for path in work.rglob("*.bin"))
        if free < self.plan.disk_bytes:
            expected = f"{self.plan.disk_bytes / GIB:.1f} GiB free for activations"
            raise CommandError(f"{work}: expected {expected}, got {free / GIB:.1f}; name another folder by --work")

    def _weigh(self, number: int) -> ExpertSums:
        experts = self.layers.load(number).mlp.experts
        sums = ExpertSums.of_weights(experts.gate_up_proj, experts.down_proj)
        return ExpertSums.from_arrays(sums.to_arrays())

    def _list_settings(self) -> dict[str, object]:
        """List what decides about the sums."""
        return {
            "model": fingerprint(str(self.folder)),
            "text": self.text.digest,
            "sums": ExpertSums.__slots__,
            "dtype": self.plan.dtype,
            "device": self.plan.device,
        }


def open_measurement(
    folder: Path,
    shape: ExpertShape,
    *,
    score: str,
    text: str,
    length: int | None,
    tokens: int,
    device: str,
    dtype: str,
    threads: int,
    seed: int | None = None,
) -> Measurement:
    """Open model and text; nothing is computed yet. `seed`: of the draw of rows, as in `read_rows`.

    Raises:
        CheckpointError, PruningError: the model or the text cannot be used. CommandError: there is no such device.
    """
    require_device(device)
    torch.set_num_threads(threads)
    weights = Weights(folder, read_config(folder))
    layers = Layers(folder, weights, getattr(torch, dtype), torch.device(device))
    wanted = SCORES[score]
    rows = TextRows(text, 0, [], [])
    if wanted.needs_text:
        rows = read_rows(text, AutoTokenizer.from_pretrained(folder), length, tokens, seed)
    plan = make_plan(layers, shape, rows, score, wanted.needs_gradients, wanted.needs_text)
    return Measurement(folder, shape, layers, rows, score, plan)
