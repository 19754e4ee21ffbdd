"""What a compiled kernel's inner loop moves, counted in its instructions, and the kernels that no tuning compiles."""

from __future__ import annotations

import triton

from laguna_serve.kernels.sentinel_moe import experts
from laguna_serve.kernels.sentinel_moe.binaries import Binary, LayerShape, compile_kernel
from laguna_serve.kernels.sentinel_moe.configs import Tiles

EXPERTS_PER_TOKEN = 8


def count_copied(binary: Binary) -> int:
    """Bytes that a step copies to shared memory, 16 at a time, without passing registers."""
    return sum(512 * count for name, count in binary.loop.items() if _is_wide_copy(name)) * binary.warps


def count_shared(binary: Binary) -> int:
    """Bytes that a step writes to and reads from shared memory; matrix units' own reads (HGMMA) are not seen."""
    return sum(_shared_bytes(name) * count for name, count in binary.loop.items()) * binary.warps


def count_matrix_instructions(binary: Binary) -> int:
    """Of a warp in a step."""
    return sum(count for name, count in binary.loop.items() if "MMA" in name)


def _is_wide_copy(name: str) -> bool:
    return name.startswith("LDGSTS") and name.endswith("128")


def _shared_bytes(name: str) -> int:
    """Of a warp's one instruction."""
    kind, *rest = name.split(".")
    if kind in ("LDSM", "STSM"):
        return 128 * (int(rest[-1]) if rest[-1].isdigit() else 1)
    if kind not in ("LDS", "STS", "LDGSTS"):
        return 0
    widths = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return 32 * next((widths[part] for part in rest if part in widths), 4)


def gate_up_step(shape: LayerShape, tiles: Tiles) -> tuple[int, int]:
    """Bytes of weights, and of everything, that a step of `gate_up` needs."""
    weights = 2 * tiles.block_a * tiles.block_h * _weight_bytes(shape)
    return weights, weights + tiles.members * tiles.block_h * shape.activations.itemsize


def down_step(shape: LayerShape, tiles: Tiles) -> tuple[int, int]:
    """Bytes of weights, and of everything, that a step of `down` needs."""
    weights = tiles.block_n * tiles.block_k * _weight_bytes(shape)
    act_bytes = 4 if shape.scaled else shape.activations.itemsize
    return weights, weights + max(16, tiles.members) * tiles.block_k * act_bytes


def _weight_bytes(shape: LayerShape) -> int:
    """Size of one weight as it is stored."""
    return 1 if shape.scaled else shape.activations.itemsize


def compile_combine(shape: LayerShape, tiles: Tiles, capability: int) -> Binary:
    """Compile `combine` as gpu.py launches it."""
    constants = {"H": shape.hidden, "K": EXPERTS_PER_TOKEN, "PARTS": tiles.parts, "BLOCK_N": 512}
    return compile_kernel(experts.combine, shape, constants | {"PDL": capability >= 90}, 4, 3, capability)


def compile_group(num_experts: int, tiles: Tiles, capability: int) -> Binary:
    """Compile `group` as gpu.py launches it, for all pairs at once."""
    constants = {"E_PAD": triton.next_power_of_2(num_experts), "MEMBERS": tiles.members, "CHUNK": 1024}
    return compile_kernel(experts.group, LayerShape(), constants, 4, 3, capability)
