"""Grouped mixture of experts over the kept blocks of structurally pruned experts."""

from laguna_serve.kernels.sentinel_moe.launch import sentinel_moe
from laguna_serve.kernels.sentinel_moe.reference import sentinel_moe_reference

__all__ = ["sentinel_moe", "sentinel_moe_reference"]
