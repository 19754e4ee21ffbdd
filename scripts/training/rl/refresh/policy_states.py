"""Hidden states of answers under the policy as it is now, in memory, as a drafter's training reads them.

The trainer has the model in PyTorch; what layers say is caught by hooks in one pass without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LagunaForCausalLM

from laguna_serve.scripts.checkpoints.drafters.dflash import TapReader
from laguna_serve.scripts.training.drafter.blocks import Blocks, Shared
from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.pruning.streaming.layers import Head

# Rows are padded to the longest of a batch and computed together, up to so many tokens.
BATCH_TOKENS = 4096


class PolicyStates:
    """States [T, H] fp32 of each row after the tapped layers and the last one, which is called `last`."""

    def __init__(self, model: LagunaForCausalLM, rows: Sequence[Row], taps: Sequence[int]) -> None:
        """Compute them."""
        self.layer_ids, self.last = tuple(taps), model.config.num_hidden_layers - 1
        self._states: list[dict[int, torch.Tensor]] = []
        for batch in _batch(rows):
            self._states += _compute(model, batch, sorted({*taps, self.last}))

    def read(self, layer: int, row: int, length: int) -> torch.Tensor:
        """Read the states [length, H] of a row's first tokens after a layer."""
        return self._states[row][layer][:length]

    def read_context(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """Read the tapped states [B, length, taps, H] of rows, zeros behind the end of one."""
        tapped = [torch.stack([self._states[row][layer][:length] for layer in self.layer_ids], dim=1) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tapped, batch_first=True)
        missing = length - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, 0, 0, 0, 0, missing)) if missing > 0 else padded


def open_blocks(model: LagunaForCausalLM, rows: Sequence[Row], taps: Sequence[int]) -> Blocks:
    """Open rows for a drafter, with the policy's states of them and what it shares with the policy."""
    shared = Shared(model.model.embed_tokens.weight.detach(), Head(model.model.norm, model.lm_head.weight.detach()))
    return Blocks(rows, PolicyStates(model, rows, taps), shared)


def _batch(rows: Sequence[Row]) -> list[list[Row]]:
    batches: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.tokens))
        if not batches or longest * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
            longest = len(row.tokens)
        batches[-1].append(row)
    return batches


@torch.no_grad()
def _compute(model: LagunaForCausalLM, rows: Sequence[Row], layers: Sequence[int]) -> list[dict[int, torch.Tensor]]:
    """Run the model over rows, padded on the right, which causal attention does not see."""
    tokens = torch.nn.utils.rnn.pad_sequence([row.tokens.long() for row in rows], batch_first=True)
    reader = TapReader(model, tuple(layers))
    try:
        model.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in reader.handles:
            handle.remove()
    return [
        {layer: reader.seen[layer][place, : len(row.tokens)].clone() for layer in layers}
        for place, row in enumerate(rows)
    ]
