"""Gumbel noise that is a function of where it is used: seed, position and how many masks the block has left.

So a state has one successor at any temperature, however it was reached and whatever shared the pass. Each value is a
hash of its key and its id (SplitMix64's finaliser, Steele et al. 2014); the two logarithms are taken in float64, as 24
bits of a uniform number give every 16-millionth token the same, largest noise.
"""

from __future__ import annotations

import torch

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
BITS = 52


def draw_gumbel(seed: int, position: int, left: int, size: int, device: torch.device) -> torch.Tensor:
    """Noise [size] fp32 for every id at a position of the answer, with `left` masks left in its block."""
    key = 0
    for part in (seed, position, left):
        key = _mix_int((key + part + 1) * GOLDEN % WORD)
    ids = torch.arange(1, size + 1, dtype=torch.int64, device=device)
    bits = _shift(_mix(_signed(key) + ids * _signed(GOLDEN)), 64 - BITS)
    uniform = (bits.double() + 0.5) / (1 << BITS)
    return -torch.log(-torch.log(uniform)).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix words, as `_mix_int` does; int64, which wraps around."""
    x = (x ^ _shift(x, SHIFTS[0])) * _signed(FACTORS[0])
    x = (x ^ _shift(x, SHIFTS[1])) * _signed(FACTORS[1])
    return x ^ _shift(x, SHIFTS[2])


def _mix_int(x: int) -> int:
    x = (x ^ x >> SHIFTS[0]) * FACTORS[0] % WORD
    x = (x ^ x >> SHIFTS[1]) * FACTORS[1] % WORD
    return x ^ x >> SHIFTS[2]


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right as if the words were unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word
