"""Laguna on a CPU, where vLLM's router cannot score its experts, and new weights are not packed.

vLLM's CPU router knows softmax scores and grouped top-k; Laguna scores with a sigmoid and selects with a bias that does
not enter the weights, and stock vLLM fails an assertion on its first token.  The router accepts a routing function,
so the subclass gives one to every sparse layer.

vLLM's grouped product wants the experts packed, and vLLM packs them the first time only: weights that are loaded again
(`/collective_rpc reload_weights`, or a transfer for RL) stay in the checkpoint's layout and are read as if they were
packed.  The subclass packs them every time.

Checked against vLLM 0.32.0.  The router's part can go when `CPURouter` scores with a sigmoid itself, that is when
`tests/plugins/test_laguna.py::test_stock_router_cannot_score_with_a_sigmoid` fails; the packing's when
`test_stock_experts_are_packed_once` does.
"""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.laguna import LagunaMoE

from laguna_serve.plugins.models import laguna
from laguna_serve.plugins.models.routing import route
from laguna_serve.plugins.routed_experts.tap import Tap, returns_experts


def sigmoid_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    *,
    router: CPURouter,
    tap: Tap | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in the signature of vLLM's `custom_routing_function`; a tap is shown the experts.

    The bias is read from the router at each call, so that new weights take effect.
    """
    weights, ids = route(gating_output, router.e_score_correction_bias, topk, renormalize=renormalize)
    return weights, ids if tap is None else tap(ids)


def process_experts(self: UnquantizedFusedMoEMethod, layer: torch.nn.Module) -> None:
    """`process_weights_after_loading` that packs the experts of a layer whose kernel is already there, too."""
    loaded_again = self.moe_kernel is not None
    UnquantizedFusedMoEMethod.process_weights_after_loading(self, layer)
    if loaded_again:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


class LagunaForCausalLM(laguna.LagunaForCausalLM):
    """Laguna whose sparse layers route on a CPU as the model was trained to, and take new weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, LagunaMoE):
                router, tap = module.experts.router, None
                if returns_experts(vllm_config):
                    tap = Tap(module.experts.layer_id)
                    router.set_capture_fn = tap.set_capture
                router.custom_routing_function = partial(sigmoid_topk, router=router, tap=tap)
                method = module.experts.routed_experts.quant_method
                if isinstance(method, UnquantizedFusedMoEMethod):
                    method.process_weights_after_loading = MethodType(process_experts, method)
