"""The arms of bench/diffusion, in this process: a model, its proposers, and a timed decode."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.calibration import measure_next_commits, name_prompt
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas, State
from laguna_serve.plugins.diffusion.decoding.reference import read_reference
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.low_precision import quantise
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.prepared import find_cost, load_proposers
from laguna_serve.plugins.diffusion.server.loading import choose_dtype, load_tokenizer
from laguna_serve.plugins.diffusion.server.options import DRAFT_WEIGHTS
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation

# A draft's weights as the target's are.
TARGET = DRAFT_WEIGHTS[0]


@dataclass(frozen=True, slots=True)
class Timed:
    """A decode of some canvases: what came out, and what it took."""

    states: list[State]
    steps: int
    passes: int
    proposed: int
    accepted: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Committed tokens, of whole canvases."""
        return sum(len(state) for state in self.states)


class Arms:
    """A model with what was learnt about its order, and perhaps a draft."""

    def __init__(
        self,
        model: Path,
        draft: Path | None,
        proposals: Path,
        schedule: str,
        cache: str,
        device: str,
        threads: int,
        dtype: str = "auto",
    ) -> None:
        """Load them; dtype auto is the checkpoint's on a GPU, float32 on a CPU.

        Raises:
            DiffusionError: a checkpoint or what was learnt cannot be used.
        """
        self.draft: Llada | None
        self.cost: float | None
        torch.set_num_threads(threads)
        self.reference = read_reference(schedule, cache)
        self._dtype = choose_dtype(dtype, model, device)
        self.target = load_model(model, self._dtype, device)
        self._draft_folder, self._proposals, self._device = draft, proposals, device
        self.load_draft(TARGET)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(model)

    def load_draft(self, weights: str) -> None:
        """Load the draft, if there is one, with its matrices as `weights` says, and what proposes by it.

        Raises:
            DiffusionError: it cannot be used, or be stored so.
        """
        self.draft, self.cost, self.proposers = None, None, {}  # one draft in memory
        if self._draft_folder is not None:
            self.draft = load_model(self._draft_folder, self._dtype, self._device)
            quantise(self.draft, weights)
            self.cost = find_cost(self.target, self.draft)
        self.proposers = load_proposers(self._proposals, self.target, self.draft, self.reference)

    @property
    def dtype(self) -> str:
        """The name of both models' dtype."""
        return str(self._dtype).removeprefix("torch.")

    def make_canvases(self, texts: Sequence[str], canvas: int, block: int) -> list[Canvas]:
        """Make a canvas for each text, which is cut on the left to what fits in front of it."""
        config = self.target.config
        room = config.max_sequence_length - canvas
        if room < 1:
            raise DiffusionError(f"--canvas: expected fewer than {config.max_sequence_length} tokens, got {canvas}")
        ids = [self._tokenizer(text)["input_ids"][-room:] for text in texts]
        return [Canvas(tuple(prompt), canvas, block, config.mask_token_id) for prompt in ids]

    def decode(self, canvases: Sequence[Canvas], proposer: str | None, states: int) -> Timed:
        """Decode canvases together to their last position, and time it."""
        speculation = None if proposer is None else Speculation(self.proposers[proposer], states)
        return _time(Decoder(Predictor(self.target), self.reference, (), speculation), canvases)

    def decode_as(self, canvases: Sequence[Canvas], schedule: str, cache: str) -> Timed:
        """Decode canvases by another reference, without proposals."""
        return _time(Decoder(Predictor(self.target), read_reference(schedule, cache)), canvases)

    def count_next_commits(self, canvases: Sequence[Canvas]) -> tuple[float, float] | None:
        """Count how often the draft knows the next position, and the next state; None without a draft."""
        if self.draft is None:
            return None
        return measure_next_commits(self.target, self.draft, canvases, self.reference)


def find_learnt(folder: Path, model: Path, texts: Sequence[str]) -> list[bool]:
    """Find which of the texts the proposals were learnt on: by their tokens, whatever file they were in.

    What was learnt before its prompts were noted is known by its lines alone.

    Raises:
        DiffusionError: the folder holds nothing that was learnt, or the model has no tokenizer.
    """
    try:
        content = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
        lines = range(content["first"], content["first"] + content["prompts"])
        names = frozenset(content.get("learnt", ()))
    except (OSError, ValueError, KeyError) as error:
        raise DiffusionError(
            f"{folder}: expected what scripts/training/diffusion/calibrate.py writes, got {error!r}; run it"
        ) from None
    if not names:
        return [number in lines for number in range(len(texts))]
    tokenizer = load_tokenizer(model)
    return [name_prompt(tokenizer(text)["input_ids"]) in names for text in texts]


def _time(decoder: Decoder, canvases: Sequence[Canvas]) -> Timed:
    began = time.perf_counter()
    runs = decoder.decode(canvases)
    seconds = time.perf_counter() - began
    return Timed(
        [run.state for run in runs],
        sum(run.steps for run in runs),
        sum(run.passes for run in runs),
        sum(run.proposed for run in runs),
        sum(run.accepted for run in runs),
        seconds,
    )
