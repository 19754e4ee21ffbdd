"""Which tiles are tried: what compiles for the device without spills, the shipped row first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

from laguna_serve.kernels.sentinel_moe import binaries
from laguna_serve.kernels.sentinel_moe.binaries import Binary, LayerShape
from laguna_serve.kernels.sentinel_moe.configs import TABLE, Path, Tiles, Weights

# Of the first kernel, then of the second, each with the other as shipped: they are timed together, and add up.
GATE_UP = {
    "decode": {"block_a": (8, 16, 32), "block_h": (64, 128, 256), "warps": (1, 2, 4), "stages": (3, 4, 5, 6)},
    "prefill": {"block_a": (32, 64, 128), "block_h": (64, 128), "warps": (4, 8), "stages": (3, 4)},
}
DOWN = {
    "decode": {"block_n": (32, 64, 128), "block_k": (32, 64, 128), "parts": (1, 2), "warps": (1, 2, 4)},
    "prefill": {"block_n": (64, 128, 256), "block_k": (32, 64), "parts": (1,), "warps": (4, 8)},
}
MOST_REGISTERS = {"decode": 168, "prefill": 255}


def list_variants(path: Path, weights: Weights) -> Iterator[Tiles]:
    """List the shipped row, then, shuffled, every other that differs from it in one kernel."""
    shipped = TABLE[path, weights]
    others = list(_list_others(shipped, path, weights))
    random.Random(0).shuffle(others)
    yield shipped
    yield from others


def _list_others(shipped: Tiles, path: Path, weights: Weights) -> Iterator[Tiles]:
    limit = 128 if weights == "fp8" else 256  # columns that one scale is of
    for block_a, block_h, warps, stages in product(*GATE_UP[path].values()):
        tiles = replace(
            shipped,
            block_a=block_a,
            block_h=block_h,
            warps=(warps, shipped.warps[1]),
            stages=(stages, shipped.stages[1]),
        )
        if tiles != shipped and block_h <= limit:
            yield tiles
    for block_n, block_k, parts, warps in product(*DOWN[path].values()):
        tiles = replace(shipped, block_n=block_n, block_k=block_k, parts=parts, warps=(shipped.warps[0], warps))
        if tiles != shipped and block_n <= limit:
            yield tiles


def compile_variant(path: Path, weights: Weights, tiles: Tiles, capability: int) -> tuple[Binary, Binary] | None:
    """Compile both kernels for XS.2's layer in bf16, or None where one does not fit the device or does not compile."""
    shape = LayerShape(scaled=weights == "fp8")
    try:
        pair = (
            binaries.compile_gate_up(shape, tiles, capability, listed=path == "prefill"),
            binaries.compile_down(shape, tiles, capability),
        )
    except Exception:  # whatever Triton or ptxas says of tiles that it cannot do
        return None
    most = MOST_REGISTERS[path]
    return pair if all(binary.fits(capability) and binary.registers <= most for binary in pair) else None


def find_space(
    path: Path, weights: Weights, capability: int, threads: int, most: int | None
) -> list[tuple[Tiles, tuple[Binary, Binary]]]:
    """Find what is worth timing of the first `most` variants, the shipped row first, and what it compiles to."""
    variants = list(list_variants(path, weights))[:most]
    with ThreadPoolExecutor(threads) as pool:
        compiled = pool.map(lambda tiles: compile_variant(path, weights, tiles, capability), variants)
        return [(tiles, pair) for tiles, pair in zip(variants, compiled, strict=True) if pair is not None]
