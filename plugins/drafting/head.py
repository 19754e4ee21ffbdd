"""A sequential head's drafts on a CPU: the formula of plugins/models/dflash_head.py, compiled by Numba.

A place is some twenty operations on a few thousand numbers, each of which costs torch several microseconds and NumPy
one or two whatever its size. Compiled, a block of the toy takes a third of NumPy's time; at a vocabulary of 100,352
reading the head's own matrix is what takes the time. The head's tensors are read as they are, so that new weights
count at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.plugins.drafting.compiled import compiled
from laguna_serve.plugins.models.dflash_head import SequentialHead

Floats = npt.NDArray[np.float32]
# Below it vLLM takes a request for greedy (v1/sample/sampler.py).
LEAST_TEMPERATURE = 1e-5


def prepare() -> None:
    """Compile what drafts a block."""
    _draft_places.prepare()


def draft_block(
    head: SequentialHead,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    anchors: torch.Tensor,
    temperature: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft a block for each request: tokens [batch, γ] int64, and what they were drawn from [batch, γ, V] float32.

    Args:
        head: in float32.
        hidden: [batch, γ, H] float32.
        logits: [batch, γ, V] float32, the block's own.
        anchors: [batch] int, the tokens before the blocks.
        temperature: [batch], at which drafts are drawn; None for the likeliest, as for requests of a temperature of 0.
    """
    batch, gamma, vocabulary = logits.shape
    weights = (module.weight.detach().numpy() for module in (head.tokens, head.mix, head.out))
    tokens = np.empty((batch, gamma + 1), np.int64)
    tokens[:, 0] = anchors.numpy()
    drawn = temperature is not None
    probs = np.empty((batch if drawn else 0, gamma, vocabulary), np.float32)
    random = torch.rand(batch, gamma if drawn else 0, dtype=torch.float64).numpy()
    warmth = np.zeros(batch, np.float32) if temperature is None else temperature.to(torch.float32).numpy()
    places = head.places(hidden).contiguous().numpy()
    _draft_places(*weights, places, logits.contiguous().numpy(), tokens, warmth, random, probs)
    return torch.from_numpy(tokens[:, 1:]), torch.from_numpy(probs) if drawn else None


@compiled(
    *("float32[:, ::1]",) * 3,
    *("float32[:, :, ::1]",) * 2,
    "int64[:, ::1]",
    "float32[::1]",
    "float64[:, ::1]",
    "float32[:, :, ::1]",
)
def _draft_places(
    embedding: Floats,
    mix: Floats,
    out: Floats,
    places: Floats,
    logits: Floats,
    tokens: npt.NDArray[np.int64],
    temperature: Floats,
    random: npt.NDArray[np.float64],
    probs: Floats,
) -> None:
    """Fill tokens [batch, 1 + γ] behind the first, and probs [batch, γ, V]; the likeliest without random [batch, γ].

    embedding and out [V, r], mix [2r, 2r], places [batch, γ, 2r].
    """
    batch, gamma, vocabulary = logits.shape
    rank = embedding.shape[1]
    known, state = np.empty((batch, 2 * rank), np.float32), np.zeros((batch, rank), np.float32)
    for place in range(gamma):
        for request in range(batch):
            known[request, :rank] = embedding[tokens[request, place]]
            known[request, rank:] = state[request]
        mixed = np.dot(known, mix.T)
        for request in range(batch):
            brought = places[request, place]
            for i in range(rank):
                gate = 1 / (1 + np.exp(-(mixed[request, i] + brought[i])))
                state[request, i] += (np.tanh(mixed[request, rank + i] + brought[rank + i]) - state[request, i]) * gate
        completed = np.dot(state, out.T)
        for request in range(batch):
            own, added = logits[request, place], completed[request]
            highest, token = np.float32(-np.inf), 0
            for each in range(vocabulary):
                added[each] += own[each]
                if added[each] > highest:
                    highest, token = added[each], each
            if random.shape[1]:
                warmth, chances, total = max(temperature[request], LEAST_TEMPERATURE), probs[request, place], 0.0
                for each in range(vocabulary):
                    chances[each] = np.exp((added[each] - highest) / warmth)
                    total += chances[each]
                if temperature[request] >= LEAST_TEMPERATURE:
                    # Above 0 and at most the sum, so that nothing without weight is found.
                    sought, cumulated = (1 - random[request, place]) * total, 0.0
                    for each in range(vocabulary):
                        cumulated += chances[each]
                        if cumulated >= sought:
                            token = each
                            break
                for each in range(vocabulary):
                    chances[each] /= total
            tokens[request, place + 1] = token
