"""Laguna on a CPU, where vLLM's router cannot score its experts, and its experts run in our grouped kernel.

vLLM's CPU router knows softmax scores and grouped top-k; Laguna scores with a sigmoid and selects with a bias that does
not enter the weights, and stock vLLM fails an assertion on its first token. The router accepts a routing function,
so the subclass gives one to every sparse layer.

Experts in bfloat16 are blocks of which none is pruned, and `kernels/sentinel_moe` multiplies many tokens in two thirds
of the time of vLLM's grouped product, and few as fast (docs/cpu.md); a token's bits do not depend on the others. On
ARM, and in other dtypes, experts are left to vLLM.

vLLM's grouped product wants the experts packed, and vLLM packs them the first time only: weights that are loaded again
(`/collective_rpc reload_weights`, or a transfer for RL) stay in the checkpoint's layout and are read as if they were
packed. The subclass packs them every time.

Checked against vLLM 0.32.0. The router's part can go when `CPURouter` scores with a sigmoid itself, that is when
`tests/plugins/test_laguna.py::test_stock_router_cannot_score_with_a_sigmoid` fails; the packing's when
`test_stock_experts_are_packed_once` does.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.laguna import LagunaMoE

from laguna_serve.kernels.isa import uses_own_experts
from laguna_serve.kernels.sentinel_moe import cpu as sentinel_cpu
from laguna_serve.kernels.sentinel_moe import sentinel_moe
from laguna_serve.plugins.formats.experts import find_unserved
from laguna_serve.plugins.models import laguna
from laguna_serve.plugins.models.routing import route
from laguna_serve.plugins.routed_experts.tap import Tap, returns_experts

logger = init_logger("vllm.laguna_serve.laguna_cpu")


class WholeExperts(CPUUnquantizedExperts):  # type: ignore[misc]
    """Experts of which every atom is kept: each is one block of `sentinel_moe`, in the checkpoint's own memory.

    w13_weight [E, 2N, H] holds the blocks as they are. w2_weight [E, H, N] keeps its shape, so that weights can be
    copied into it again, over memory that has the kernel's order, [E, N, H].
    """

    block_start: torch.Tensor

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn w2 over in memory; again changes nothing."""
        layer.w2_weight.data = layer.w2_weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        self.block_start = torch.arange(len(layer.w2_weight) + 1, dtype=torch.int32)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> None:
        """Write what the chosen experts make of hidden_states [T, H] into output; see `sentinel_moe`."""
        E, H, N = w2.shape
        w13 = w1.view(E, 2, N, H)
        blocks = w2.transpose(1, 2)
        output.copy_(
            sentinel_moe(hidden_states, topk_weights, topk_ids, w13, blocks, self.block_start, max_blocks_per_expert=1)
        )


def takes_experts(layer: Any) -> bool:
    """Whether `WholeExperts` is the better one for a layer's unquantised experts, and takes them."""
    method, moe = layer.quant_method, layer.quant_method.moe
    width = moe.intermediate_size_per_partition
    return (
        issubclass(method.experts_cls, CPUUnquantizedExperts)  # with AMX its subclass
        and uses_own_experts()
        and moe.in_dtype == torch.bfloat16
        and moe.activation == MoEActivation.SILU
        and moe.moe_parallel_config.ep_size == 1
        and not layer.apply_router_weight_on_input
        and find_unserved(width, moe.hidden_dim, moe.experts_per_token) is None
        and sentinel_cpu.load() is not None
    )


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
                experts = module.experts.routed_experts
                method = experts.quant_method
                if isinstance(method, UnquantizedFusedMoEMethod):
                    if takes_experts(experts):
                        method.experts_cls = WholeExperts
                        logger.info_once("Experts in bfloat16: laguna_serve::sentinel_moe")
                    method.process_weights_after_loading = MethodType(process_experts, method)
