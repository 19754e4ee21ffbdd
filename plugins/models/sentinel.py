"""Laguna with pruned experts: only the kept blocks are on the device, and the routed experts run on `sentinel_moe`.

Two kinds of checkpoint load:

- a compact one, as `laguna compact` writes it, whose config.json has `expert_pruning.kept_blocks`;
- a base one with the published masks, where `expert_pruning` names two files (`keep_mask`, `group_indices`); every
  expert is cut down on the host as it is read, so that pruned blocks never reach the device.

Attention, norms, the dense layers and the shared experts are vLLM's Laguna; of its MoE layer nothing is used.  The
weights stay in the checkpoint's layout, so that loading them again in place is a plain copy.

Read in vLLM 0.26.0, 0.29.0 and 0.32.0, run on 0.32.0.  Tensor and expert parallelism are refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import laguna
from vllm.model_executor.utils import set_weight_attrs

from laguna_serve.kernels.sentinel_moe import sentinel_moe
from laguna_serve.plugins.models.routing import route
from laguna_serve.plugins.pruning import Pruning, PruningError, read_pruning, read_shape


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one sparse layer keeps.  ``pruning`` and ``index`` are set when the base's experts are cut while loading."""

    kept_blocks: int
    block_size: int
    blocks_per_expert: int
    pruning: Pruning | None = None
    index: int = 0


class SentinelExperts(nn.Module):
    """A sparse layer's routed experts: w13_blocks [n, 2, B, H], w2_blocks [n, B, H], block_start [E + 1] int32."""

    block_start: torch.Tensor

    def __init__(self, num_experts: int, hidden_size: int, plan: LayerPlan, prefix: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.plan = plan
        self.prefix = prefix
        n, B = plan.kept_blocks, plan.block_size
        self.w13_blocks = nn.Parameter(torch.empty(n, 2, B, hidden_size), requires_grad=False)
        self.w2_blocks = nn.Parameter(torch.empty(n, B, hidden_size), requires_grad=False)
        bias = torch.zeros(num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        # Not a parameter, as vLLM's dummy loader fills these with noise: even shares until a checkpoint says otherwise.
        start = torch.arange(num_experts + 1, dtype=torch.int64) * n // num_experts
        if plan.pruning is not None:
            start = torch.from_numpy(plan.pruning.block_start(plan.index)).to(start)
        self.register_buffer("block_start", start.to(torch.int32), persistent=False)
        for parameter in (self.w13_blocks, self.w2_blocks):
            set_weight_attrs(parameter, {"weight_loader": _load_blocks})
        self._wanted = self._expected_names()
        self._missing = set(self._wanted)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights [T, k] fp32, ids [T, k] int32 → [T, H]."""
        return sentinel_moe(
            x,
            weights,
            ids,
            self.w13_blocks,
            self.w2_blocks,
            self.block_start,
            max_blocks_per_expert=self.plan.blocks_per_expert,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Load what the checkpoint has under `mlp.experts.`; vLLM's loader calls it, perhaps in several goes.

        Yields what was set, the blocks once all that makes them up has come: vLLM refuses to start without.
        """
        for name, tensor in weights:
            if name == "e_score_correction_bias":
                _load(self.e_score_correction_bias, tensor)
                yield name
                continue
            if name not in self._wanted:
                raise self._mismatch("kept blocks, or a base checkpoint with expert_pruning.keep_mask", name)
            if self.plan.pruning is not None:
                self._load_expert(name, tensor)
            elif name == "block_start":
                _load(self.block_start, self._check_start(tensor))
            else:
                parameter = getattr(self, name)
                if tensor.shape != parameter.shape:
                    raise self._mismatch(f"{name} {list(parameter.shape)}", list(tensor.shape))
                _load(parameter, tensor)
            self._missing.discard(name)
            if not self._missing:
                self._missing = set(self._wanted)  # of the next time that weights are loaded
                yield from ("w13_blocks", "w2_blocks")

    def _expected_names(self) -> frozenset[str]:
        if self.plan.pruning is None:
            return frozenset(("w13_blocks", "w2_blocks", "block_start"))
        names = ("gate_proj", "up_proj", "down_proj")
        return frozenset(f"{expert}.{name}.weight" for expert in range(self.num_experts) for name in names)

    def _load_expert(self, name: str, tensor: torch.Tensor) -> None:
        """Cut one matrix of one expert down to its kept blocks."""
        number, projection, _ = name.split(".")
        expert, plan = int(number), self.plan
        assert plan.pruning is not None
        start = plan.pruning.block_start(plan.index)
        place = slice(int(start[expert]), int(start[expert + 1]))
        atoms = torch.from_numpy(plan.pruning.atoms(plan.index, expert))
        if projection == "down_proj":
            _load(self.w2_blocks, tensor.t()[atoms], place)
        else:
            _load(self.w13_blocks, tensor[atoms], (place, 0 if projection == "gate_proj" else 1))

    def _check_start(self, start: torch.Tensor) -> torch.Tensor:
        widths = start.diff()
        if start.numel() != self.num_experts + 1 or start[0] != 0 or start[-1] != self.plan.kept_blocks:
            expected = f"block_start of {self.num_experts + 1} entries from 0 to {self.plan.kept_blocks}"
            raise self._mismatch(expected, f"{start.numel()} from {int(start[0])} to {int(start[-1])}")
        if widths.min() < 0 or widths.max() > self.plan.blocks_per_expert:
            limit = f"0 to {self.plan.blocks_per_expert} blocks for every expert"
            raise self._mismatch(limit, f"{int(widths.min())} to {int(widths.max())}")
        return start

    def _mismatch(self, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.prefix}: expected {expected}, got {got}; make the checkpoint again")


class SentinelMoE(nn.Module):
    """Laguna's sparse block: router, kept blocks of the routed experts, shared expert."""

    def __init__(self, config: Any, plan: LayerPlan, prefix: str) -> None:
        super().__init__()
        self.top_k: int = config.num_experts_per_tok
        self.renormalize = bool(getattr(config, "norm_topk_prob", True))
        self.routed_scale = float(getattr(config, "moe_routed_scaling_factor", 1.0))
        self.softcap = float(getattr(config, "moe_router_logit_softcapping", 0.0) or 0.0)
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = SentinelExperts(config.num_experts, config.hidden_size, plan, f"{prefix}.experts")
        self.shared_expert: laguna.LagunaMLP | None = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = laguna.LagunaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.shared_expert_intermediate_size,
                hidden_act=config.hidden_act,
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
        weights, ids = route(logits, bias, self.top_k, renormalize=self.renormalize, scale=self.routed_scale)
        out: torch.Tensor = self.experts(x, weights, ids)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out.view(hidden_states.shape)


class LagunaSentinelForCausalLM(laguna.LagunaForCausalLM):  # type: ignore[misc]
    """vLLM's Laguna whose sparse layers hold only the blocks that pruning kept."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        _refuse_what_is_not_supported(vllm_config)
        plans = _plan_layers(config)
        # Built with feed-forward layers of width 1, which are then replaced: vLLM's own would hold every block.
        super().__init__(vllm_config=vllm_config.with_hf_config(_without_feed_forward(config)), prefix=prefix)
        self.config = self.model.config = config
        for number in range(self.model.start_layer, self.model.end_layer):
            layer, name = self.model.layers[number], f"{prefix}.model.layers.{number}.mlp".lstrip(".")
            if number in plans:
                layer.mlp = SentinelMoE(config, plans[number], name)
            else:
                layer.mlp = laguna.LagunaMLP(
                    config.hidden_size, config.intermediate_size, config.hidden_act, prefix=name
                )


def _plan_layers(config: Any) -> dict[int, LayerPlan]:
    """Sparse layer number → what it keeps.  Completes `config.expert_pruning`, which vLLM's compile cache hashes."""
    shape = read_shape(config.to_dict(), str(config.name_or_path or "config.json"))
    described = getattr(config, "expert_pruning", None)
    if not isinstance(described, dict):
        raise PruningError(
            f"config.json: expected expert_pruning, got {described!r}; make a compact checkpoint with `laguna compact`"
        )
    pruning: Pruning | None = None
    if "keep_mask" in described:
        files = [Path(described["keep_mask"]), Path(described["group_indices"])]
        pruning = read_pruning(files[0], files[1], shape)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        described = described | {"sha256": digest, "block_size": pruning.block_size}
        described |= {"blocks_per_expert": pruning.blocks_per_expert, "kept_blocks": pruning.kept_blocks}
        config.expert_pruning = described
    kept, block, most = (described.get(key) for key in ("kept_blocks", "block_size", "blocks_per_expert"))
    if not isinstance(kept, list) or len(kept) != len(shape.layers) or not all(type(count) is int for count in kept):
        expected = f"kept_blocks to be one number for each of {len(shape.layers)} sparse layers"
        raise PruningError(f"config.json: expected expert_pruning.{expected}, got {kept!r}; make the checkpoint again")
    if type(block) is not int or type(most) is not int or block * most != shape.intermediate_size:
        expected = f"block_size × blocks_per_expert to be {shape.intermediate_size}"
        got = f"{block!r} × {most!r}"
        raise PruningError(f"config.json: expected expert_pruning.{expected}, got {got}; make the checkpoint again")
    return {layer: LayerPlan(kept[i], block, most, pruning, i) for i, layer in enumerate(shape.layers)}


def _without_feed_forward(config: Any) -> Any:
    """Return a copy of the config whose layers are all dense and one wide."""
    narrow = copy.copy(config)
    narrow.num_experts = 0
    narrow.intermediate_size = 1
    return narrow


def _refuse_what_is_not_supported(vllm_config: VllmConfig) -> None:
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    remedy = "serve the base checkpoint instead"
    if parallel.tensor_parallel_size > 1 or parallel.enable_expert_parallel:
        size = parallel.tensor_parallel_size
        raise ValueError(f"LagunaSentinelForCausalLM: expected one device, got tensor parallel size {size}; {remedy}")
    if vllm_config.quant_config is not None:
        method = vllm_config.quant_config.get_name()
        raise ValueError(f"LagunaSentinelForCausalLM: expected unquantised weights, got {method}; {remedy}")
    if getattr(config, "moe_apply_router_weight_on_input", False):
        raise ValueError(
            f"LagunaSentinelForCausalLM: expected router weights on the output, got on the input; {remedy}"
        )


def _load(tensor: torch.Tensor, *arguments: Any) -> None:
    """By the tensor's own loader, which vLLM replaces while it loads weights again."""
    getattr(tensor, "weight_loader", default_weight_loader)(tensor, *arguments)


def _load_blocks(param: torch.Tensor, loaded_weight: torch.Tensor, place: Any = ...) -> None:
    param.data[place].copy_(loaded_weight)
