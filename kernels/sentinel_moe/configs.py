"""Tile shapes of the Triton kernels by block size and width of the dtype, and how each was chosen.

The decode path's tiles never depend on the number of tokens: that is what makes a row's bits independent of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Tiles of decode.py.

    Attributes:
        block_a: atoms of a `gate_up` program, times two for gate and up.
        block_h: hidden elements of a step of its loop.
        slice_: atoms of each block that a `down` program adds up; the block size is a multiple.
        block_n: output columns of a `down` program.
        warps, stages: of `gate_up` and of `down`.
    """

    block_a: int
    block_h: int
    slice_: int
    block_n: int
    warps: tuple[int, int]
    stages: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Tiles of prefill.py: pairs, atoms and hidden elements of `gate_up`; columns and atoms of `down`."""

    block_m: int
    block_a: int
    block_h: int
    block_n: int
    block_k: int
    warps: tuple[int, int]
    stages: tuple[int, int]


# Decode by (block size, bytes of an element), prefill by bytes of an element.  None has been timed on a GPU yet: chosen
# so that a multiprocessor of an H200 has some 33 KiB of weights on their way (4.3 TB/s × 1 µs ÷ 132), and so that the
# kernels compile for sm_90 without spills and within its shared memory, which tests/kernels/test_sentinel_compile.py
# checks row by row.
DECODE: dict[tuple[int, int], DecodeConfig] = {
    (16, 2): DecodeConfig(16, 128, 16, 64, (4, 4), (4, 32)),
    (32, 2): DecodeConfig(16, 128, 16, 64, (4, 4), (4, 32)),
    (64, 2): DecodeConfig(16, 128, 16, 64, (4, 4), (4, 32)),
    (128, 2): DecodeConfig(16, 128, 32, 64, (4, 4), (4, 16)),
}
PREFILL: dict[int, PrefillConfig] = {2: PrefillConfig(64, 64, 64, 128, 64, (4, 8), (3, 3))}
# Any other block size, and fp32.
ANY_DECODE = DecodeConfig(16, 64, 16, 64, (4, 4), (3, 8))
ANY_PREFILL = PrefillConfig(32, 16, 64, 64, 32, (4, 4), (3, 3))


def decode_config(block_size: int, element_size: int) -> DecodeConfig:
    """Choose the decode tiles for blocks of ``block_size`` atoms; the number of tokens is left out on purpose."""
    return DECODE.get((block_size, element_size), ANY_DECODE)


def prefill_config(element_size: int) -> PrefillConfig:
    """Choose the prefill tiles, which any block size fits."""
    return PREFILL.get(element_size, ANY_PREFILL)
