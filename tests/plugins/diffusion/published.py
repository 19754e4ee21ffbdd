"""The published decoding loop, written out literally from its description, with logits and noise as they are given.

Differences from the loop in ML-GSAI/LLaDA's generate.py are three, each where that leaves the result to the device or
to the clock: float32 throughout, the first of equal confidences, and noise that the caller hands in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Model = Callable[[torch.Tensor], torch.Tensor]
# (position in the answer, masks left in the block, vocabulary) → uniform noise as Gumbel values.
Noise = Callable[[int, int, int], torch.Tensor]


def count_transfers(masks: int, steps: int) -> list[int]:
    """How many tokens each step of a block gets."""
    return [masks // steps + (number < masks % steps) for number in range(steps)]


@torch.no_grad()
def generate(
    model: Model,
    prompt: list[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    noise: Noise | None = None,
) -> list[int]:
    """The answer's ids; `model` gives logits [B, n, V] fp32 of ids [B, n]."""
    x = torch.full((1, len(prompt) + gen_length), mask_id)
    x[0, : len(prompt)] = torch.tensor(prompt)
    prompt_index = x != mask_id
    blocks = gen_length // block_length
    for number in range(blocks):
        begin = len(prompt) + number * block_length
        end = begin + block_length
        transfers = count_transfers(int((x[:, begin:end] == mask_id).sum()), steps // blocks)
        for transfer in transfers:
            mask_index = x == mask_id
            if cfg_scale > 0:
                unconditional = x.clone()
                unconditional[prompt_index] = mask_id
                logits, un_logits = (model(rows) for rows in (x, unconditional))
                logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            else:
                logits = model(x)
            noisy = logits.clone()
            if temperature > 0:
                assert noise is not None
                left = int((x[:, begin:end] == mask_id).sum())
                for at in range(begin, end):
                    noisy[0, at] += temperature * noise(at - len(prompt), left, logits.shape[-1])
            x0 = noisy.argmax(-1)
            p = logits.softmax(-1)
            x0_p = p.gather(-1, x0[..., None]).squeeze(-1)
            x0_p[:, end:] = -torch.inf
            x0 = torch.where(mask_index, x0, x)
            confidence = torch.where(mask_index, x0_p, -torch.inf)
            select = confidence[0].sort(descending=True, stable=True).indices[:transfer]
            x[0, select] = x0[0, select]
    return x[0, len(prompt) :].tolist()
