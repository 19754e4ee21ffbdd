"""What the compiler makes of the Triton kernels for a GPU that need not be there.

Registers, spills and shared memory come from the binary, and the inner loop's instructions. bench/moe_tuning leaves
out tiles that spill by it; the tests hold every row of the table to it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laguna_serve.kernels.sentinel_moe import experts
from laguna_serve.kernels.sentinel_moe.configs import Tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor, in all generations since Volta
# Shared memory that a program may take, by compute capability.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
INTEGERS = {"ids_ptr", "block_start_ptr", "members_ptr", "experts_ptr"}
# Arguments that are multiples of 16 whatever the layer, beside the pointers.
ALIGNED = {"act_stride", "first_column", "columns"}
# Without what is never executed (@!PT).
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P(?!T)\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer as the kernels are compiled for it: H, B, pairs of a batch, its dtypes."""

    hidden: int = 2048
    block: int = 64
    pairs: int = 64
    activations: torch.dtype = torch.bfloat16
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel.

    Attributes:
        registers: of a thread; `spilled`: whether any went to memory.
        shared_bytes: of a program.
        loop: the innermost loop's instructions of a warp, by name; empty where no matrix instruction is in one.
    """

    registers: int
    spilled: bool
    shared_bytes: int
    warps: int
    loop: Counter[str]

    def fits(self, capability: int) -> bool:
        """No spills, and within the registers and shared memory of a multiprocessor."""
        inside = self.shared_bytes <= SHARED_LIMITS[capability] and self.registers * self.warps * 32 <= REGISTERS
        return inside and not self.spilled


def compile_gate_up(shape: LayerShape, tiles: Tiles, capability: int, *, listed: bool = False) -> Binary:
    """Compile `gate_up` as gpu.py launches it on an NVIDIA GPU."""
    constants = {
        "H": shape.hidden,
        "B": shape.block,
        "P_PAD": 16 if listed else max(16, triton.next_power_of_2(shape.pairs)),
        "MEMBERS": tiles.members,
        "BLOCK_A": tiles.block_a,
        "BLOCK_H": tiles.block_h,
        "LISTED": listed,
        "SCALED": shape.scaled,
        "PTX": True,
        "PRECISION": "ieee",
        "PDL": capability >= 90,
    }
    return compile_kernel(experts.gate_up, shape, constants, tiles.warps[0], tiles.stages[0], capability)


def compile_down(shape: LayerShape, tiles: Tiles, capability: int) -> Binary:
    """Compile `down` as gpu.py launches it."""
    constants = {
        "H": shape.hidden,
        "B": shape.block,
        "MEMBERS": tiles.members,
        "PARTS": tiles.parts,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "SCALED": shape.scaled,
        "COMPUTE": COMPUTE[shape.activations],
        "SHIFT": 1024 if shape.activations == torch.float16 else 1,
        "PTX": True,
        "PRECISION": "ieee",
        "PDL": capability >= 90,
    }
    return compile_kernel(experts.down, shape, constants, tiles.warps[1], tiles.stages[1], capability)


def compile_kernel(
    kernel: Any, shape: LayerShape, constants: Mapping[str, object], warps: int, stages: int, capability: int
) -> Binary:
    """Compile a kernel for these constants, and read what came of it."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else _type_of(name, shape) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, assembly = _disassemble(binary.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = (int(number) for number in found.groups())
    spilled = stack + local > 0 or re.search(r"\b(LDL|STL)\b", assembly) is not None
    return Binary(registers, spilled, binary.metadata.shared, warps, _count_loop(assembly))


def _type_of(name: str, shape: LayerShape) -> str:
    element = ELEMENTS[shape.activations]
    if name in INTEGERS:
        return "*i32"
    if name in ("w13_ptr", "w2_ptr"):
        return f"*{element}" if not shape.scaled else "*u8" if name == "w13_ptr" else "*i16"
    if name in ("x_ptr", "out_ptr") or (name == "act_ptr" and not shape.scaled):
        return f"*{element}"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[str(TOOLS / "cuobjdump"), "-res-usage", file.name], [str(TOOLS / "nvdisasm"), "-c", file.name]]
        usage, assembly = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands
        )
    return usage, assembly


def _count_loop(assembly: str) -> Counter[str]:
    """Count the instructions of the shortest loop with a matrix instruction."""
    lines = [line for line in assembly.splitlines() if _LABEL.match(line) or _INSTRUCTION.match(line)]
    labels: dict[str, int] = {}
    bodies: list[list[str]] = []
    for i, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = i
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            bodies.append(lines[labels[branch[1]] : i + 1])
    loops = [Counter(found[1] for line in body if (found := _INSTRUCTION.match(line))) for body in bodies]
    loops = [loop for loop in loops if any("MMA" in name for name in loop)]
    return min(loops, key=lambda loop: loop.total(), default=Counter())
