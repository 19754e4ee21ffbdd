"""Laguna as vLLM serves it, with the router's bias loaded.

A checkpoint names that bias `mlp.experts.e_score_correction_bias`, or, as transformers' parameter, `mlp.gate.…`. vLLM
hands every tensor under `experts.` to its expert loader, which passes over a name that it does not know, without a
word, and passes over biases that no module has: it stays zero, and tokens go to other experts than in training. The
subclass takes these tensors out and loads them itself.

Read in vLLM 0.26.0, 0.29.0 and 0.32.0, run on 0.32.0. It can go when
`tests/plugins/test_laguna.py::test_stock_loader_drops_the_router_bias` fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import laguna

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.layers import WIDTHS_KEY

# As the releases have it, and by the name of transformers' own parameter.
BIASES = ("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias")
# What only our other classes serve: experts of which blocks are left, and dense layers of different widths.
BLOCKS = ("mlp.experts.w13_blocks", "mlp.experts.w2_blocks", "mlp.experts.block_start")
SENTINEL, DENSE = "LagunaSentinelForCausalLM", "LagunaDenseForCausalLM"


class LagunaForCausalLM(laguna.LagunaForCausalLM):  # type: ignore[misc]
    """vLLM's Laguna whose sparse layers select experts with the bias they were trained with."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _refuse_another_class(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @refuse_incomplete
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were set."""
        biases: dict[str, torch.Tensor] = {}

        def without_biases() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith(BLOCKS):
                    raise _refuse(name, "kept blocks of experts", f"{SENTINEL} and expert_pruning")
                if name.endswith(BIASES):
                    biases[name[: name.rindex("mlp.")]] = tensor
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(without_biases())
        parameters = dict(self.named_parameters())
        for layer, tensor in biases.items():
            for name in parameters:  # none, where another pipeline rank has the layer
                if name.startswith(layer) and name.endswith("e_score_correction_bias"):
                    default_weight_loader(parameters[name], tensor)
                    loaded.add(name)
        return loaded


def _refuse_another_class(config: Any) -> None:
    """Raise ValueError for a checkpoint that this class would load in part, and of which nonsense would come."""
    name = str(config.name_or_path or "config.json")
    if getattr(config, "expert_pruning", None):
        raise _refuse(name, "expert_pruning", f"the architecture {SENTINEL}")
    if getattr(config, WIDTHS_KEY, None) is not None:
        raise _refuse(name, WIDTHS_KEY, f"the architecture {DENSE}")


def _refuse(name: str, found: str, needed: str) -> ValueError:
    remedy = f"its config.json must name {needed}, as the one that was written with it"
    return ValueError(f"{name}: expected whole layers for LagunaForCausalLM, got {found}; {remedy}")
