"""Every row of the table compiled without a GPU, for four generations: what the hardware has is enough, nothing spills.

And what the loops do: weights by asynchronous copies of 16 bytes, each once, and shared memory that is not the limit.
"""

from __future__ import annotations

import pytest
import torch
import triton
from traffic import (
    compile_combine,
    compile_group,
    count_copied,
    count_matrix_instructions,
    count_shared,
    down_step,
    gate_up_step,
)

from laguna_serve.kernels.sentinel_moe import binaries, gpu
from laguna_serve.kernels.sentinel_moe.binaries import LayerShape
from laguna_serve.kernels.sentinel_moe.configs import TABLE, Tiles

pytestmark = pytest.mark.slow
CAPABILITIES = (80, 90, 100, 120)
SHAPES = {
    "16-bit": LayerShape(),
    "fp8": LayerShape(scaled=True),
    "fp32": LayerShape(activations=torch.float32),
    "fp16": LayerShape(activations=torch.float16),
    "fp16 over fp8": LayerShape(activations=torch.float16, scaled=True),
}
# All of them on Hopper; what XS.2 is served with on the others.
ROWS = [(name, 90) for name in SHAPES] + [(name, other) for other in (80, 100, 120) for name in ("16-bit", "fp8")]
# Bytes of shared memory written and read for a byte of weights. 128 bytes a cycle on 132 multiprocessors of 1.98 GHz
# are 33 TB/s; an H200's memory delivers 4.3 of them.
MOST_TRAFFIC = {"16-bit": (2.75, 2.75), "fp16": (2.75, 2.75), "fp8": (3.5, 4.1), "fp16 over fp8": (3.5, 4.1)}
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
# Registers of a thread that finds its members among 512 pairs, and of the small kernels, by the compiler's release.
MOST_REGISTERS = {"512 pairs": 136, "small": 64} if RELEASE >= (3, 9) else {"512 pairs": 192, "small": 72}
MULTIPROCESSORS = 132
IN_FLIGHT = 33 * 1024


def find_tiles(path: str, name: str) -> Tiles:
    kind = "fp8" if "fp8" in name else "fp32" if name == "fp32" else "16-bit"
    return TABLE[path, kind]  # type: ignore[index]


@pytest.mark.parametrize(("name", "capability"), ROWS)
def test_decode(name: str, capability: int) -> None:
    shape, tiles = SHAPES[name], find_tiles("decode", name)
    gate_up = binaries.compile_gate_up(shape, tiles, capability)
    down = binaries.compile_down(shape, tiles, capability)
    assert gate_up.fits(capability), gate_up
    assert down.fits(capability), down
    if name == "fp32":
        return
    steps = (gate_up_step(shape, tiles), down_step(shape, tiles))
    for binary, (weights, everything), most in zip((gate_up, down), steps, MOST_TRAFFIC[name], strict=True):
        assert count_copied(binary) == everything, "a step copies something twice, or not asynchronously"
        assert count_shared(binary) / weights <= most + 0.005, count_shared(binary) / weights


@pytest.mark.parametrize(("name", "capability"), ROWS)
def test_prefill(name: str, capability: int) -> None:
    shape, tiles = SHAPES[name], find_tiles("prefill", name)
    gate_up = binaries.compile_gate_up(shape, tiles, capability, listed=True)
    down = binaries.compile_down(shape, tiles, capability)
    for binary in (gate_up, down):
        assert binary.fits(capability), binary
        if name != "fp32":
            assert count_matrix_instructions(binary) > 0


@pytest.mark.parametrize("pairs", [8, 512])
def test_decode_at_one_token_and_at_64(pairs: int) -> None:
    """Members are found among 8 and among 512 pairs: the loop is the same, instruction by instruction."""
    tiles = find_tiles("decode", "16-bit")
    binary = binaries.compile_gate_up(LayerShape(pairs=pairs), tiles, 90)
    assert binary.fits(90), binary
    assert binary.registers <= MOST_REGISTERS["512 pairs"]
    usual = binaries.compile_gate_up(LayerShape(), tiles, 90).loop
    for kind in ("MMA", "LDSM", "LDGSTS"):
        assert {n: c for n, c in binary.loop.items() if kind in n} == {n: c for n, c in usual.items() if kind in n}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_small_kernels(capability: int) -> None:
    tiles = find_tiles("decode", "fp8")
    for binary in (
        compile_combine(LayerShape(), tiles, capability),
        compile_group(256, tiles, capability),
        compile_group(512, tiles, capability),
    ):
        assert binary.fits(capability), binary
        assert binary.registers <= MOST_REGISTERS["small"]


@pytest.mark.parametrize("block", [16, 48, 256])
def test_any_block_size(block: int) -> None:
    shape = LayerShape(block=block)
    assert binaries.compile_gate_up(shape, find_tiles("decode", "16-bit"), 90).fits(90)


@pytest.mark.parametrize("name", ["16-bit", "fp8"])
def test_one_token_of_xs2_keeps_the_chip_at_work(name: str) -> None:
    """Eight experts of 512: two programs a multiprocessor or near it, and what they have asked for ahead."""
    tiles, size = find_tiles("decode", name), 1 if name == "fp8" else 2
    programs = 8 * 512 // tiles.block_a, 8 * triton.cdiv(2048, tiles.block_n) * tiles.parts
    steps = 2 * tiles.block_a * tiles.block_h * size, tiles.block_n * tiles.block_k * size
    for count, step, stages in zip(programs, steps, tiles.stages, strict=True):
        assert count >= 256
        assert count * step * (stages - 1) / MULTIPROCESSORS > 0.9 * IN_FLIGHT


def test_table_is_within_what_the_kernels_take() -> None:
    for (_, weights), tiles in TABLE.items():
        assert tiles.members >= 8
        assert weights != "fp8" or (128 % tiles.block_h == 0 and 128 % tiles.block_n == 0)
    assert gpu.DECODE_TOKENS == 64
