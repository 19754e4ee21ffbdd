"""A product of fixed order for Triton's interpreter.

The interpreter's own `tl.dot` is NumPy's BLAS, whose sums depend on the processor and on a column's place in its
tile, so that a test of row bits would test the BLAS; and it multiplies bf16 operands as the integers that hold them.
Here every element of the product is the accumulator plus a[i, 0] · b[0, j], a[i, 1] · b[1, j], … in this order, each
product and each sum rounded once in fp32: what remains is the order in which the kernel calls it.

Checked against triton 3.9 (`InterpreterBuilder.create_dot` in triton/runtime/interpreter.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl

WIDENED = (tl.bfloat16, tl.float16, tl.float32)


def fixed_order_dot(_builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """d [M, N] fp32 + a [M, K] · b [K, N], K ascending. The other arguments are the interpreter's, and unused."""
    left, right = widen(a), widen(b)
    assert d.data.dtype == np.float32, f"accumulator: expected float32, got {d.data.dtype}"
    sums = d.data.copy()
    product = np.empty_like(sums)
    for column, row in zip(left.T[:, :, None], right, strict=True):
        np.multiply(column, row, out=product)
        sums += product
    return type(d)(sums, d.dtype.scalar)


def widen(operand: Any) -> npt.NDArray[np.float32]:
    """An operand's values as fp32; bf16 is held as uint16 by the interpreter."""
    kind = operand.get_element_ty()
    assert kind in WIDENED, f"operand: expected one of {WIDENED}, got {kind}"
    if kind == tl.bfloat16:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    wide: npt.NDArray[np.float32] = operand.data.astype(np.float32)
    return wide
