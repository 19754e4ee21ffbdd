"""Linear layers in bfloat16 on CPUs without instructions that multiply whole matrices."""

from laguna_serve.kernels.isa import IsaError, choose_path, uses_linear_op
from laguna_serve.kernels.linear.build import load_library
from laguna_serve.kernels.linear.launch import linear, linear_reference

__all__ = [
    "IsaError",
    "choose_path",
    "linear",
    "linear_reference",
    "load_library",
    "uses_linear_op",
]
