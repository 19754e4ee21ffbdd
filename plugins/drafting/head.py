"""A sequential head's drafts on a CPU: the formula of plugins/models/dflash_head.py, place by place, by NumPy.

A place is some twenty operations on a few thousand numbers.  Torch takes several microseconds for each whatever its
size, NumPy one.  The head's own tensors are read, so that new weights count at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.plugins.models.dflash_head import SequentialHead
from laguna_serve.plugins.repairs.verification import draw

Floats = npt.NDArray[np.float32]
# Below it vLLM takes a request for greedy (v1/sample/sampler.py).
LEAST_TEMPERATURE = 1e-5


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
    embedding, mix, out = (module.weight.detach().numpy() for module in (head.tokens, head.mix, head.out))
    places, own = head.places(hidden).numpy(), logits.numpy()
    state, tokens = np.zeros((batch, head.rank), np.float32), np.empty((batch, gamma + 1), np.int64)
    tokens[:, 0] = anchors.numpy()
    probs: Floats | None = None
    if temperature is not None:
        probs = np.empty((batch, gamma, vocabulary), np.float32)
        random = torch.rand(batch, gamma, dtype=torch.float64).numpy()
        warmth = temperature.numpy()
        greedy, warmth = warmth < LEAST_TEMPERATURE, np.maximum(warmth, LEAST_TEMPERATURE)[:, None]
    for place in range(gamma):
        mixed = np.concatenate((embedding[tokens[:, place]], state), 1) @ mix.T
        mixed += places[:, place]
        gate, new = mixed[:, : head.rank], np.tanh(mixed[:, head.rank :])
        state = state + (new - state) * (0.5 + 0.5 * np.tanh(gate / 2))
        completed = state @ out.T
        completed += own[:, place]
        if probs is None:
            tokens[:, place + 1] = completed.argmax(1)
            continue
        likeliest = completed.argmax(1)
        completed -= completed.max(1, keepdims=True)
        chances = np.exp(completed / warmth)
        cumulated = chances.cumsum(1, dtype=np.float64)
        np.divide(chances, cumulated[:, -1:], out=probs[:, place])
        for request in range(batch):
            drawn = likeliest[request] if greedy[request] else draw(cumulated[request], random[request, place])
            tokens[request, place + 1] = drawn
    return torch.from_numpy(tokens[:, 1:]), None if probs is None else torch.from_numpy(probs)
