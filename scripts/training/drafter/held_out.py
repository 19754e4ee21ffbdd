"""Acceptance length on held-out answers, exactly as vLLM would count it while decoding them.

vLLM counts τ = 1 + accepted ÷ drafts (speculation/acceptance.py). Along one recorded answer, with α_k of place k as
objective.py has it, a step at anchor a accepts n drafts and leaves its next anchor at a + n + 1, with

    P(n ≥ k | a) = α₁(a) ⋯ α_k(a)        P(a') = Σ_a P(a) · P(n = a' − a − 1 | a)        P(first emitted token) = 1

since the prefill commits the first token and drafts begin there. So in place of drawing drafts

    τ = 1 + Σ_a P(a) · Σ_k P(n ≥ k | a)  ÷  Σ_a P(a)

over the anchors of all answers whose whole block was emitted. For greedy drafts α is 0 or 1 and this is the count of
one run; for drawn ones it is the mean over all runs that commit this text. The answers have to be sampled from the
target at the temperature: then the mean over them is that of serving. Where `top_k` or the like cut the distribution,
greedy drafts are still counted exactly, and drawn ones as if nothing had been cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.training.drafter.blocks import Blocks
from laguna_serve.scripts.training.drafter.objective import Drafts, find_acceptance
from laguna_serve.scripts.training.drafter.result import HeldOutTau
from laguna_serve.serving.kit.signals import check_signals

# Anchors of a row that are drafted at together.
CHUNK = 48
RESAMPLES = 1000
MODES: tuple[Drafts, ...] = ("greedy", "probabilistic")


def measure_drafter(drafter: LagunaDrafter, blocks: Blocks) -> list[HeldOutTau]:
    """Measure at every temperature that the rows have, for both ways of drafting."""
    temperatures = sorted({row.temperature for row in blocks.rows})
    found = []
    for temperature in temperatures:
        chosen = [number for number, row in enumerate(blocks.rows) if row.temperature == temperature]
        modes = MODES if temperature > 0 else MODES[:1]
        counts = np.array([count_row(drafter, blocks, row, modes) for row in chosen])  # [rows, modes, 1 + γ]
        for place, mode in enumerate(modes):
            tau = _summarise(counts[:, place], temperature, mode)
            if tau is not None:
                found.append(tau)
    return found


@torch.no_grad()
def count_row(
    drafter: LagunaDrafter, blocks: Blocks, row: int, modes: Sequence[Drafts]
) -> list[npt.NDArray[np.float64]]:
    """Count the steps of decoding one answer as `walk` does, for each way of drafting."""
    gamma, record = drafter.shape.gamma, blocks.rows[row]
    places = torch.arange(record.start, max(record.start, len(record.tokens) - gamma))  # none of a short answer
    alphas: dict[Drafts, list[torch.Tensor]] = {mode: [] for mode in modes}
    batch = blocks.open([row])
    for chunk in places.split(CHUNK) if len(places) else ():
        check_signals()
        drafted = batch.draft(drafter, chunk[None], target=record.temperature > 0)
        for mode in modes:
            alphas[mode].append(find_acceptance(drafted, mode)[0].cpu())
    return [walk(torch.cat(parts).double().numpy()) if parts else np.zeros(1 + gamma) for parts in alphas.values()]


def walk(alpha: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Decode along an answer: α [anchors, γ] → expected steps, and those that accept at least 1 … γ drafts, [1 + γ]."""
    anchors, gamma = alpha.shape
    reached = np.zeros(anchors + gamma + 1)
    reached[0] = 1.0
    least = np.concatenate([np.ones((anchors, 1)), alpha.cumprod(axis=1)], axis=1)  # P(n ≥ 0 … γ)
    exactly = least - np.concatenate([least[:, 1:], np.zeros((anchors, 1))], axis=1)
    for place in range(anchors):
        reached[place + 1 : place + gamma + 2] += reached[place] * exactly[place]
    counted: npt.NDArray[np.float64] = reached[:anchors] @ least
    return counted


def _summarise(counts: npt.NDArray[np.float64], temperature: float, mode: str) -> HeldOutTau | None:
    """Sum up counts [rows, 1 + γ]; None where no answer is as long as a block."""
    total = counts.sum(axis=0)
    if not total[0]:
        return None
    generator = np.random.default_rng(0)
    sums = counts[generator.integers(len(counts), size=(RESAMPLES, len(counts)))].sum(axis=1)
    drawn = 1 + sums[:, 1:].sum(axis=1) / np.maximum(sums[:, 0], 1e-12)
    low, high = np.quantile(drawn, (0.025, 0.975))
    shares = total[1:] / total[0]
    return HeldOutTau(
        temperature=temperature,
        drafts=mode,
        tau=round(float(1 + shares.sum()), 4),
        ci95=(round(float(low), 4), round(float(high), 4)),
        per_position=tuple(round(float(share), 4) for share in shares),
        steps=round(float(total[0]), 1),
        answers=int((counts[:, 0] > 0).sum()),
    )
