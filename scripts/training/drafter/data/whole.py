"""A target that is no Laguna: transformers' class of it, whole in memory, its hidden states taken by hooks.

A drafter has of its target the embedding, the states after some layers, and logits that are head · norm(last state).
Models that scale one of these, or bend their logits, are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laguna_serve.scripts.training.pruning.streaming.layers import Head
from laguna_serve.serving.checkpoint import CheckpointError, Target
from laguna_serve.serving.checkpoint.others import PLANNED
from laguna_serve.serving.checkpoint.parameters import count_parameters
from laguna_serve.serving.kit.errors import first_line

SCALED = ("Gemma", "Granite")


class WholeTarget:
    """Computes in one dtype on one device; the weights are read when something is asked for."""

    def __init__(self, folder: Path, target: Target, dtype: torch.dtype, device: torch.device) -> None:
        """Read nothing yet.

        Raises:
            CheckpointError: its parts are not those that a drafter reads.
        """
        if target.architecture not in PLANNED or target.architecture.startswith(SCALED):
            known = ", ".join(
                sorted(name.removesuffix("ForCausalLM") for name in PLANNED if not name.startswith(SCALED))
            )
            raise CheckpointError(f"{folder}: expected a Laguna, or one of {known}, got {target.architecture}")
        self.folder, self.target, self.dtype, self.device = folder, target, dtype, device

    @property
    def count(self) -> int:
        """Decoder layers of the target."""
        return self.target.num_layers

    @property
    def memory_bytes(self) -> int:
        """What the weights take."""
        return count_parameters(self.target) * self.dtype.itemsize

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: expected a whole checkpoint, got: {first_line(error)}") from None
        return model.eval().requires_grad_(False).to(self.device)

    def load_shared(self) -> tuple[torch.Tensor, Head]:
        """Load what a drafter shares with the target, in fp32: its embedding [V, H] and its head."""
        model = self._model
        norm = copy.deepcopy(model.get_decoder().norm).float()
        return model.get_input_embeddings().weight.float(), Head(norm, model.get_output_embeddings().weight.float())

    @torch.no_grad()
    def run(self, rows: Sequence[torch.Tensor], layers: Collection[int]) -> dict[int, list[torch.Tensor]]:
        """Compute rows of tokens [T]: by layer the states [T, H] of each behind it, on the CPU.

        The rows are padded on the right, which causal attention does not see.
        """
        padded = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True).to(self.device)
        decoder, found = self._model.get_decoder(), dict[int, torch.Tensor]()

        def take(number: int, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        hooks = [
            decoder.layers[number].register_forward_hook(
                lambda _layer, _given, output, number=number: take(number, output)
            )
            for number in layers
        ]
        try:
            decoder(input_ids=padded, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            number: [states[: len(row)].cpu() for states, row in zip(found[number], rows, strict=True)]
            for number in layers
        }
