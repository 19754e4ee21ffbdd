"""The PTX that widens 8-bit floats, executed here instruction by instruction over every code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from laguna_serve.kernels.sentinel_moe import e4m3

MASK = 0xFFFFFFFF
FORMATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """The registers after the handful of instructions that e4m3.py uses; operands are registers or numbers."""
    registers = dict(inputs)

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in text.strip("{} ").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if words[0] in ("", ".reg"):
            continue
        name, to, *operands = words
        values = [read(operand) for operand in operands]
        if name == "mov.b32":
            result = values[0]
        elif name == "prmt.b32":
            source = [*values[0].to_bytes(4, "little"), *values[1].to_bytes(4, "little")]
            result = int.from_bytes(bytes(source[values[2] >> 4 * i & 7] for i in range(4)), "little")
        elif name in ("shl.b32", "shr.b32"):
            result = values[0] << values[1] if name[2] == "l" else values[0] >> values[1]
        elif name in ("and.b32", "or.b32"):
            result = values[0] & values[1] if name[0] == "a" else values[0] | values[1]
        else:
            kind = FORMATS[name.removeprefix("fma.rn.")]
            a, b, c = (lanes(value, kind).double() for value in values)
            result = int((a * b + c).to(kind).view(torch.int16).view(torch.int32)) & MASK
        registers[to] = result & MASK
    return registers


def lanes(register: int, kind: torch.dtype) -> torch.Tensor:
    signed = register - 2**32 if register >= 2**31 else register
    return torch.tensor([signed], dtype=torch.int32).view(kind)


def number(codes: list[int], kind: torch.dtype) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).to(kind)


def all_codes() -> Iterator[list[int]]:
    """Every code but those of NaN, each in all four bytes of a word once."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    for i, code in enumerate(codes):
        word = [codes[(i * 7 + j * 31 + 5) % len(codes)] for j in range(4)]
        for place in range(4):
            yield [*word[:place], code, *word[place + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kind"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_every_code_in_every_place(suffix: str, kind: torch.dtype) -> None:
    four, low, high = (getattr(e4m3, f"_{name}_{suffix}").value for name in ("FOUR", "LOW", "HIGH"))
    for word in all_codes():
        packed = int.from_bytes(bytes(word), "little")
        done = run_ptx(four, {"$2": packed})
        assert torch.equal(torch.cat([lanes(done["$0"], kind), lanes(done["$1"], kind)]), number(word, kind)), word
        assert torch.equal(lanes(run_ptx(low, {"$1": packed})["$0"], kind), number(word[::2], kind)), word
        assert torch.equal(lanes(run_ptx(high, {"$1": packed})["$0"], kind), number(word[1::2], kind)), word


def test_codes_of_nan_are_480() -> None:
    done = run_ptx(e4m3._FOUR_BF16.value, {"$2": 0x7FFF7FFF})
    assert lanes(done["$0"], torch.bfloat16).tolist() == [-480.0, 480.0]
