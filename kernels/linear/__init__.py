"""Linear layers in bfloat16 on CPUs that have no bfloat16 arithmetic, or none that is fast."""

from laguna_serve.kernels.isa import IsaError, choose_path, multiplies_bf16
from laguna_serve.kernels.linear.build import load_library
from laguna_serve.kernels.linear.launch import linear, linear_reference

__all__ = [
    "IsaError",
    "choose_path",
    "linear",
    "linear_reference",
    "load_library",
    "multiplies_bf16",
]
