"""AMX's registers, which Linux gives to a process that asks for them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from laguna_serve.kernels import isa

pytestmark = pytest.mark.vllm
ASKS, PRODUCT = (
    "from laguna_serve.kernels.isa import ask_for_tiles; assert ask_for_tiles()",
    """
import torch
from vllm import _custom_ops as ops
x, out = torch.ones(1, 32).bfloat16(), torch.empty(1, 32).bfloat16()
w13, w2 = (ops.cpu_prepack_moe_weight(torch.ones(1, rows, 32).bfloat16(), "amx") for rows in (64, 32))
ops.cpu_fused_moe(out, x, w13, w2, None, None, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), "silu", "amx")
""",
)


@pytest.mark.skipif("amx_tile" not in isa.find_usable(environ={}), reason="needs a processor with AMX")
@pytest.mark.parametrize(("before", "status"), [("", -signal.SIGILL), (ASKS, 0)], ids=["stock", "asked"])
def test_stock_kernels_use_tiles_without_asking(before: str, status: int) -> None:
    """When the first fails, vLLM asks for itself: `register` need not."""
    done = subprocess.run([sys.executable, "-c", before + PRODUCT], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr[-2000:]
