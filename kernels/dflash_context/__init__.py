"""The context of a DFlash drafter in bfloat16 on a CPU, made of the target's hidden states by one call."""

from laguna_serve.kernels.dflash_context.launch import Context, Weights, context_reference, make_context

__all__ = ["Context", "Weights", "context_reference", "make_context"]
