"""Laguna with pruned experts: only the kept blocks are on the device, and the routed experts run on `sentinel_moe`.

Two kinds of checkpoint load:

- a compact one, as `laguna compact` writes it, whose config.json has `expert_pruning.kept_blocks`;
- a base one with the published masks, where `expert_pruning` names two files (`keep_mask`, `group_indices`); every
  expert is cut down on the host as it is read, so that pruned blocks never reach the device.

Both may be in FP8 (formats/experts.py): the blocks then stay so, with the scales of each atom in fp32, and
fp8_layers.py says what becomes of the other layers. Attention, norms, the dense layers and the shared experts are
vLLM's Laguna; of its MoE layer nothing is used.

Of several tensor-parallel ranks each holds a part of every expert's blocks (plugins/shards.py), and one all-reduce
adds up what routed and shared experts give.

Read in vLLM 0.26.0, 0.29.0 and 0.32.0, run on 0.32.0. Expert parallelism is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models import laguna

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.formats.experts import (
    ExpertFormatError,
    check_stored_experts,
    find_unserved,
    read_base_format,
)
from laguna_serve.plugins.models.fp8_layers import (
    build_unquantised,
    check_method,
    dequantise_linears,
    dequantises,
    leave_out,
)
from laguna_serve.plugins.models.routing import route
from laguna_serve.plugins.models.sentinel_experts import LayerPlan, SentinelExperts
from laguna_serve.plugins.pruning import Pruning, PruningError, read_pruning, read_shape
from laguna_serve.plugins.routed_experts.tap import Tap, refuse_silence, returns_experts, with_hf_config
from laguna_serve.plugins.shards import Shard


class SentinelMoE(nn.Module):
    """Laguna's sparse block: router, kept blocks of the routed experts, shared expert."""

    def __init__(
        self, config: Any, plan: LayerPlan, quant_config: QuantizationConfig | None, prefix: str, shard: Shard
    ) -> None:
        super().__init__()
        self.ranks = shard.ranks
        self.top_k: int = config.num_experts_per_tok
        self.routed_scale = float(getattr(config, "moe_routed_scaling_factor", 1.0))
        self.softcap = float(getattr(config, "moe_router_logit_softcapping", 0.0) or 0.0)
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = SentinelExperts(config.num_experts, config.hidden_size, plan, f"{prefix}.experts", shard)
        self.tap: Tap | None = None
        self.shared_expert: laguna.LagunaMLP | None = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = laguna.LagunaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.shared_expert_intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                reduce_results=False,
                prefix=f"{prefix}.shared_expert",
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, H] → […, H]."""
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits, _ = self.gate(x)
        logits = logits.float()
        if self.softcap > 0.0:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        bias = self.experts.e_score_correction_bias
        weights, ids = route(logits, bias, self.top_k, renormalize=True, scale=self.routed_scale)
        if self.tap is not None:
            ids = self.tap(ids)
        out: torch.Tensor = self.experts(x, weights, ids)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        if self.ranks > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out.view(hidden_states.shape)


class LagunaSentinelForCausalLM(laguna.LagunaForCausalLM):  # type: ignore[misc]
    """vLLM's Laguna whose sparse layers hold only the blocks that pruning kept."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        _refuse_what_is_not_supported(vllm_config)
        plans, plain = _plan_layers(config), dequantises(vllm_config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        # Built with feed-forward layers of width 1, which are then replaced: vLLM's own would hold every block.
        narrow = build_unquantised(
            with_hf_config(vllm_config, _without_feed_forward(config, ranks)), only_feed_forward=not plain
        )
        super().__init__(vllm_config=narrow, prefix=prefix)
        self.config = self.model.config = config
        self._dequantises = plain
        quant_config = vllm_config.quant_config
        if quant_config is not None and plain:
            quant_config = leave_out(quant_config, "")
        shard = Shard(get_tensor_model_parallel_rank(), ranks)
        for number in range(self.model.start_layer, self.model.end_layer):
            layer, name = self.model.layers[number], f"{prefix}.model.layers.{number}.mlp".lstrip(".")
            if number in plans:
                layer.mlp = SentinelMoE(config, plans[number], quant_config, name, shard)
                layer.mlp.tap = Tap(number) if returns_experts(vllm_config) else None
            else:
                layer.mlp = laguna.LagunaMLP(
                    config.hidden_size, config.intermediate_size, config.hidden_act, quant_config, prefix=name
                )

    @refuse_incomplete
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were set."""
        loaded: set[str] = super().load_weights(dequantise_linears(weights) if self._dequantises else weights)
        return loaded


def _plan_layers(config: Any) -> dict[int, LayerPlan]:
    """Sparse layer number → what it keeps. Completes `config.expert_pruning`, which vLLM's compile cache hashes."""
    shape = read_shape(config.to_dict(), str(config.name_or_path or "config.json"))
    described = getattr(config, "expert_pruning", None)
    if not isinstance(described, dict):
        raise PruningError(
            f"config.json: expected expert_pruning, got {described!r}; make a compact checkpoint with `laguna compact`"
        )
    pruning: Pruning | None = None
    try:
        if "keep_mask" in described:
            files = [Path(described["keep_mask"]), Path(described["group_indices"])]
            pruning = read_pruning(files[0], files[1], shape)
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
            described = described | {"sha256": digest, "format": read_base_format(config.to_dict(), "config.json")}
            described |= {"block_size": pruning.block_size, "blocks_per_expert": pruning.blocks_per_expert}
            config.expert_pruning = described = described | {"kept_blocks": pruning.kept_blocks}
        stored = check_stored_experts(config.to_dict(), described, "config.json")
    except ExpertFormatError as error:
        raise PruningError(str(error)) from None
    reason = find_unserved(stored.block_size, config.hidden_size, config.num_experts_per_tok)
    if reason is not None:
        raise PruningError(f"config.json: {reason}")
    return {
        layer: LayerPlan(stored.kept_blocks[i], stored.block_size, stored.blocks_per_expert, pruning, i, stored.format)
        for i, layer in enumerate(shape.layers)
    }


def _without_feed_forward(config: Any, ranks: int) -> Any:
    """Return a copy of the config whose layers are all dense and, on each rank, one wide."""
    narrow = copy.copy(config)
    narrow.num_experts = 0
    narrow.intermediate_size = ranks
    return narrow


def _refuse_what_is_not_supported(vllm_config: VllmConfig) -> None:
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    remedy = "serve the base checkpoint instead"
    if parallel.enable_expert_parallel:
        expected = "expected experts on every rank, got expert parallelism"
        raise ValueError(f"LagunaSentinelForCausalLM: {expected}; leave out --enable-expert-parallel")
    check_method(vllm_config, "LagunaSentinelForCausalLM", remedy)
    refuse_silence(vllm_config)
    if getattr(config, "moe_apply_router_weight_on_input", False):
        raise ValueError(
            f"LagunaSentinelForCausalLM: expected router weights on the output, got on the input; {remedy}"
        )
