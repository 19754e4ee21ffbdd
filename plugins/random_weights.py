"""`--load-format laguna-random`: weights that are made up so that a model's work is a real model's.

vLLM's own `dummy` draws every tensor, norms and router biases too, from ±0.001. Activations then all but vanish, the
router's bias alone decides, and every token goes to the same experts: a step over γ + 1 tokens reads the experts of
one, and speculation at full size looks cheaper than it is. Here norms are 1, biases 0 and matrices keep the scale of
what goes through them, so that tokens choose experts of their own.

Checked against vLLM 0.32 (model_executor/model_loader/dummy_loader.py, models/qwen3_dflash.py, laguna_dflash.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from laguna_serve.plugins.formats.experts import SCALE_BLOCK

SEED = 1234
# The standard deviation of values in FP8, whose largest is 448, and rows of them that are drawn at a time.
SPREAD, MOST_ROWS = 32.0, 1 << 16
KV_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
# What a DFlash drafter's own load_weights ends with.
BUILD = "_build_fused_kv_buffers"


class RandomWeightsLoader(DummyModelLoader):  # type: ignore[misc]
    """vLLM's dummy loader, with the distribution of an initialised model."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill every parameter in place, on its device; values packed into integers stay as vLLM fills them."""
        super().load_weights(model, model_config)
        fill_parameters(model)
        if hasattr(inner := getattr(model, "model", None), BUILD):
            finish_drafter(model, inner)


def finish_drafter(model: Any, inner: Any) -> None:
    """Set what a drafter notes when its weights are loaded, which no dummy loader does.

    It has the target's embedding; a head of its own only where its vocabulary is reduced: with the target's, its ids
    would lead beyond the table that maps them.
    """
    model.has_own_embed_tokens = False
    model.has_own_lm_head = getattr(model, "draft_id_to_target_id", None) is not None
    getattr(inner, BUILD)()


@torch.no_grad()
def fill_parameters(model: nn.Module) -> None:
    """Norms to 1, biases to 0, matrices to normal values of variance 1 / inputs; in FP8 by their scales."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or "scale" in name:
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(SEED)
        generator = generators[parameter.device]
        if parameter.element_size() < 2:
            for part in parameter.data.flatten(0, -2).split(MOST_ROWS):
                part.copy_(torch.randn(part.shape, generator=generator, device=part.device) * SPREAD)
        elif parameter.ndim < 2:
            parameter.fill_(0.0 if "bias" in name else 1.0)
        else:
            parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    for module in model.modules():
        fill_scales(module)


def fill_scales(module: nn.Module) -> None:
    """Fill a module's scales of FP8 weights, and those of a KV cache, which vLLM's dummy loader draws below zero."""
    own = dict(module.named_parameters(recurse=False))
    fp8 = any(p.dtype == torch.float8_e4m3fn and "scale" not in name for name, p in own.items())
    for name, parameter in own.items():
        if name in KV_SCALES:
            parameter.fill_(1.0)
        elif fp8 and "scale" in name and parameter.ndim > 1:
            parameter.fill_(1 / SPREAD / math.sqrt(parameter.shape[-1] * SCALE_BLOCK))
