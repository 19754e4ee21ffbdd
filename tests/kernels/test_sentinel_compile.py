"""Every tuned row compiled for Hopper without a GPU: no spills, within the chip's registers and shared memory."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laguna_serve.kernels.sentinel_moe import decode, prefill
from laguna_serve.kernels.sentinel_moe.configs import ANY_DECODE, ANY_PREFILL, DECODE, PREFILL

pytestmark = pytest.mark.slow

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 227 * 1024
REGISTERS = 65536
INTERMEDIATE, HIDDEN, EXPERTS, TOP_K = 512, 2048, 256, 8
ELEMENT = {2: ("bf16", "fp16"), 4: ("fp32",)}


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel."""

    registers: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    assembly: str


def compile_for_hopper(
    kernel: Any, element: str, constants: dict[str, object], warps: int, stages: int, folder: Path, **options: object
) -> Binary:
    """Compile with the argument types of gpu.py, every pointer aligned to 16 bytes as torch's allocations are."""
    types = {
        name: f"*{element}"
        if name in ("x_ptr", "w13_ptr", "w2_ptr", "act_ptr", "out_ptr", "pair_out_ptr")
        else "*fp32"
        if name in ("weights_ptr", "partial_ptr")
        else "*i32"
        if name in ("ids_ptr", "block_start_ptr", "plan_ptr", "arrivals_ptr")
        else "*i64"
        if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=HOPPER, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assembly = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = (int(number) for number in found.groups())
    return Binary(registers, local, stack, binary.metadata.shared, assembly)


def assert_fits(binary: Binary, warps: int, tensor_cores: bool) -> None:
    assert binary.local_bytes == 0
    assert binary.stack_bytes == 0
    assert not re.search(r"\b(LDL|STL)\b", binary.assembly), "registers spilled"
    assert binary.registers * warps * 32 <= REGISTERS
    assert binary.shared_bytes <= SHARED_LIMIT
    if tensor_cores:
        assert re.search(r"\bH?G?MMA\b|HMMA|HGMMA", binary.assembly)
        assert re.search(r"LDGSTS\.\S*128|UTMALDG|UBLKCP", binary.assembly), "weights do not come 16 bytes at a time"


DECODE_ROWS = [(block, config, element) for (block, size), config in DECODE.items() for element in ELEMENT[size]]
DECODE_ROWS += [(16, ANY_DECODE, "fp32"), (48, ANY_DECODE, "bf16")]
PREFILL_ROWS = [
    (block, config, element) for size, config in PREFILL.items() for element in ELEMENT[size] for block in (16, 64)
]
PREFILL_ROWS += [(64, ANY_PREFILL, "fp32")]


@pytest.mark.parametrize(("block", "config", "element"), DECODE_ROWS, ids=lambda value: str(value)[:60])
def test_decode_row(block: int, config: Any, element: str, tmp_path: Path) -> None:
    blocks = triton.cdiv(INTERMEDIATE, block)
    constants = {
        "H": HIDDEN,
        "B": block,
        "E_PAD": EXPERTS,
        "K_PAD": TOP_K,
        "MAX_BLOCKS_PAD": triton.next_power_of_2(blocks),
        "ARRIVALS_PAD": triton.next_power_of_2(triton.cdiv(HIDDEN, config.block_n)),
        "BLOCK_A": config.block_a,
        "BLOCK_H": config.block_h,
        "PRECISION": "ieee",
        "PDL": True,
    }
    gate_up = compile_for_hopper(
        decode.gate_up, element, constants, config.warps[0], config.stages[0], tmp_path, launch_pdl=False
    )
    assert_fits(gate_up, config.warps[0], element != "fp32")
    assert block % config.slice_ == 0
    constants = {
        "H": HIDDEN,
        "B": block,
        "SPLIT": block // config.slice_,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee",
        "PDL": True,
    }
    down = compile_for_hopper(
        decode.down, element, constants, config.warps[1], config.stages[1], tmp_path, launch_pdl=True
    )
    assert_fits(down, config.warps[1], element != "fp32")


@pytest.mark.parametrize(("block", "config", "element"), PREFILL_ROWS, ids=lambda value: str(value)[:60])
def test_prefill_row(block: int, config: Any, element: str, tmp_path: Path) -> None:
    shared = {"H": HIDDEN, "B": block, "BLOCK_M": config.block_m, "PRECISION": "ieee"}
    gate_up = compile_for_hopper(
        prefill.gate_up,
        element,
        shared | {"BLOCK_A": config.block_a, "BLOCK_H": config.block_h},
        config.warps[0],
        config.stages[0],
        tmp_path,
    )
    assert_fits(gate_up, config.warps[0], element != "fp32")
    down = compile_for_hopper(
        prefill.down,
        element,
        shared | {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
        config.warps[1],
        config.stages[1],
        tmp_path,
    )
    assert_fits(down, config.warps[1], element != "fp32")
