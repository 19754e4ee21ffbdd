"""8-bit floats (e4m3fn, as uint8) widened in registers, for processors with and without instructions for it.

The bits of e4m3, shifted to the places of a wider format's exponent and mantissa, are the same value times a power of
two, subnormals too: one multiplication puts it right, exactly. Hopper's own conversion goes by way of fp16 and gives
bf16 sixteen at a cycle and multiprocessor, fewer than its memory delivers; this takes 2.5 instructions an element.
The codes of NaN, 0x7f and 0xff, come out as ±480, which no other code has.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two bytes in the upper halves of the lanes of t → two floats in $0. Constants: 2¹²⁰ in bf16, 2⁸ in fp16; −0.
_BF16 = "and.b32 s, s, 0x07f007f0; and.b32 t, t, 0x80008000; or.b32 s, s, t; fma.rn.bf16x2 $0, s, c, z;"
_FP16 = "and.b32 s, s, 0x3f803f80; and.b32 t, t, 0x80008000; or.b32 s, s, t; fma.rn.f16x2 $0, s, c, z;"
_BEGIN_BF16 = "{ .reg .b32 s, t, c, z; mov.b32 c, 0x7b807b80; mov.b32 z, 0x80008000;"
_BEGIN_FP16 = "{ .reg .b32 s, t, c, z; mov.b32 c, 0x5c005c00; mov.b32 z, 0x80008000;"
_FOUR_BF16 = tl.constexpr(
    f"{_BEGIN_BF16} prmt.b32 t, $2, 0, 0x1404; shr.b32 s, t, 4; {_BF16}"
    f" prmt.b32 t, $2, 0, 0x3424; shr.b32 s, t, 4; {_BF16.replace('$0', '$1')} }}"
)
_FOUR_FP16 = tl.constexpr(
    f"{_BEGIN_FP16} prmt.b32 t, $2, 0, 0x1404; shr.b32 s, t, 1; {_FP16}"
    f" prmt.b32 t, $2, 0, 0x3424; shr.b32 s, t, 1; {_FP16.replace('$0', '$1')} }}"
)
_LOW_BF16 = tl.constexpr(f"{_BEGIN_BF16} shl.b32 s, $1, 4; shl.b32 t, $1, 8; {_BF16} }}")
_LOW_FP16 = tl.constexpr(f"{_BEGIN_FP16} shl.b32 s, $1, 7; shl.b32 t, $1, 8; {_FP16} }}")
_HIGH_BF16 = tl.constexpr(f"{_BEGIN_BF16} shr.b32 s, $1, 4; mov.b32 t, $1; {_BF16} }}")
_HIGH_FP16 = tl.constexpr(f"{_BEGIN_FP16} shr.b32 s, $1, 1; mov.b32 t, $1; {_FP16} }}")


@triton.jit
def _widen_plainly(bits, TO: tl.constexpr):
    code = bits.to(tl.int32)
    wide = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(TO)


@triton.jit
def widen(codes, TO: tl.constexpr, PTX: tl.constexpr):
    """uint8 → TO, element by element; with PTX for 16-bit TO, four at a time."""
    if PTX and tl.bfloat16 == TO:
        return tl.inline_asm_elementwise(_FOUR_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    if PTX and tl.float16 == TO:
        return tl.inline_asm_elementwise(_FOUR_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    return _widen_plainly(codes, TO)


@triton.jit
def widen_low(pairs, TO: tl.constexpr, PTX: tl.constexpr):
    """Widen the lower bytes of uint16, the first of two neighbours in memory → TO."""
    if PTX and tl.bfloat16 == TO:
        return tl.inline_asm_elementwise(_LOW_BF16, "=r,r", [pairs], dtype=tl.bfloat16, is_pure=True, pack=2)
    if PTX and tl.float16 == TO:
        return tl.inline_asm_elementwise(_LOW_FP16, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    return _widen_plainly(pairs & 0xFF, TO)


@triton.jit
def widen_high(pairs, TO: tl.constexpr, PTX: tl.constexpr):
    """Widen the upper bytes of uint16, the second of two neighbours in memory → TO."""
    if PTX and tl.bfloat16 == TO:
        return tl.inline_asm_elementwise(_HIGH_BF16, "=r,r", [pairs], dtype=tl.bfloat16, is_pure=True, pack=2)
    if PTX and tl.float16 == TO:
        return tl.inline_asm_elementwise(_HIGH_FP16, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    return _widen_plainly(pairs >> 8, TO)
