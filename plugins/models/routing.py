"""Laguna's router: which experts a token goes to, and with what weights.

On a GPU it is one launch, vLLM's own `topk_sigmoid`, which stock Laguna routes with: bias, renormalisation and scale
included, and −1 for the rows by which vLLM fills up a CUDA graph's batch, so that no expert is read for them. Those
rows are looked up in the forward context, so that this is an operator of its own, which a compiled graph calls and does
not look into. Elsewhere it is plain torch. Read in vLLM 0.32.0, whose CPU build has no such kernel.
"""

from __future__ import annotations

import functools
import inspect

import torch

SCHEMA = "route(Tensor logits, Tensor bias, int topk, bool renormalize, float scale) -> (Tensor, Tensor)"


def route(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, *, renormalize: bool, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid scores; the bias takes part in the selection and not in the weights, which are multiplied by `scale`.

    logits [T, E], soft-capped already; bias [E] fp32. Returns weights [T, topk] fp32 and expert ids [T, topk] int32.

    Source: `LagunaTopKRouter` in transformers' modular_laguna.py.
    """
    if logits.is_cuda:
        routed: tuple[torch.Tensor, torch.Tensor] = torch.ops.laguna_serve.route.default(
            logits.float(), bias, topk, renormalize, scale
        )
        return routed
    scores = logits.float().sigmoid()
    ids = torch.topk(scores + bias, topk, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights if scale == 1.0 else weights * scale, ids.to(torch.int32)


def route_by_vllm(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, renormalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` for fp32 logits by vLLM's kernel; what this vLLM's does not take is done behind it."""
    from vllm import _custom_ops as ops

    weights = torch.empty(len(logits), topk, dtype=torch.float32, device=logits.device)
    ids, unused = (torch.empty(len(logits), topk, dtype=torch.int32, device=logits.device) for _ in range(2))
    padding = find_padding(len(logits))
    extra = {"e_score_correction_bias": bias, "routed_scaling_factor": scale, "is_padding": padding}
    taken = _list_parameters(ops.topk_sigmoid)
    ops.topk_sigmoid(
        weights, ids, unused, logits, renormalize, **{name: extra[name] for name in extra if name in taken}
    )
    if "routed_scaling_factor" not in taken and scale != 1.0:
        weights *= scale
    if "is_padding" not in taken and padding is not None:
        ids.masked_fill_(padding[:, None], -1)
    return weights, ids


def find_padding(tokens: int) -> torch.Tensor | None:
    """[tokens] bool: the rows that are no tokens, as the running step says; None where it says nothing."""
    from vllm import envs, forward_context

    if not getattr(envs, "VLLM_MOE_SKIP_PADDING", False) or not forward_context.is_forward_context_available():
        return None
    padding: torch.Tensor | None = getattr(forward_context.get_forward_context(), "is_padding", None)
    return None if padding is None else padding[:tokens]


@functools.cache
def _list_parameters(function: object) -> frozenset[str]:
    assert callable(function)
    return frozenset(inspect.signature(function).parameters)


def _route_fake(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, renormalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = (logits.shape[0], topk)
    return logits.new_empty(size, dtype=torch.float32), logits.new_empty(size, dtype=torch.int32)


_library = torch.library.Library("laguna_serve", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("route", route_by_vllm, "CUDA")
torch.library.register_fake("laguna_serve::route", _route_fake, lib=_library)
