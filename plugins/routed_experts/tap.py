"""Where a mixture shows which experts it chose: an operator that hands the ids on to whom vLLM has bound.

vLLM binds its capturer to a model's routers when it makes the KV cache, after the model was compiled. On a CPU the
graph looks through the router, so that a capture bound later is in no graph; here the graph calls an operator which it
does not look into, and which asks for the capture when it runs. Its output is its input's copy: what a graph uses
stays in it.

Read in vLLM 0.26 to 0.32 (`model_executor/layers/fused_moe/routed_experts_capturer.py`): before 0.28 it asks its own
routers alone, before 0.31 it is asked by the model's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.fused_moe import routed_experts_capturer

SCHEMA = "show_experts(Tensor ids, int layer) -> Tensor"

Capture = Callable[[torch.Tensor], None]
# By layer of the one model of this process that has routers.
_captures: dict[int, Capture | None] = {}


def returns_experts(vllm_config: Any) -> bool:
    """Whether the engine was started to return routed experts."""
    asked = getattr(vllm_config, "aux_output_config", vllm_config.model_config)
    return bool(getattr(asked, "enable_return_routed_experts", False))


def refuse_silence(vllm_config: Any) -> None:
    """Refuse to return the experts of layers without a router of vLLM's, where it would return zeros for them.

    Raises:
        ValueError: experts are asked for, and this vLLM does not look for a `Tap`.
    """
    if returns_experts(vllm_config) and not hasattr(routed_experts_capturer, "RoutedExpertsCaptureSource"):
        expected = f"expected vLLM 0.28 or later with a pruned model, got {vllm.__version__}"
        raise ValueError(f"--return-routed-experts: {expected}; upgrade vLLM, or leave out the flag")


class Tap(nn.Module):
    """A layer's choices, `layer_id` counted from 0 over all layers: a `RoutedExpertsCaptureSource` of vLLM's."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id

    def get_capture(self) -> Capture | None:
        """Return what is shown the ids of every step."""
        return _captures.get(self.layer_id)

    def set_capture(self, capture: Capture | None) -> None:
        """Show the ids of every step to `capture` from now on."""
        _captures[self.layer_id] = capture

    capture_fn = property(get_capture, set_capture)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Show the chosen experts [T, topk] int32; returns a copy, which is to be used in their place."""
        shown: torch.Tensor = torch.ops.laguna_serve.show_experts.default(ids, self.layer_id)
        return shown


def with_hf_config(vllm_config: Any, hf_config: Any) -> Any:
    """Derive a configuration for a part of a mixture; vLLM would refuse to return the experts of one without any."""
    if not (hasattr(vllm_config, "aux_output_config") and returns_experts(vllm_config)):
        return vllm_config.with_hf_config(hf_config)
    asked = vllm_config.aux_output_config
    try:
        vllm_config.aux_output_config = type(asked)()
        derived = vllm_config.with_hf_config(hf_config)
    finally:
        vllm_config.aux_output_config = asked
    derived.aux_output_config = asked  # what a compiled graph is kept by
    return derived


def _show(ids: torch.Tensor, layer: int) -> torch.Tensor:
    capture = _captures.get(layer)
    if capture is not None:
        capture(ids)
    return ids.clone()


_library = torch.library.Library("laguna_serve", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("show_experts", _show, "CompositeExplicitAutograd")
torch.library.register_fake("laguna_serve::show_experts", lambda ids, layer: torch.empty_like(ids), lib=_library)
