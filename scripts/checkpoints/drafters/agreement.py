"""Do two drafters, one in each format, compute the same? Their plain PyTorch forms on random states, in fp32."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from laguna_serve.plugins.layers import SLIDING
from laguna_serve.scripts.checkpoints.drafters.algebra import Tensors
from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter
from laguna_serve.serving.checkpoint import ConfigJson
from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.kit.results import JsonObject

# What is folded is rounded once more in the stored dtype: of bf16's 8 bits, over a few layers.
TOLERANCE = 3e-2
CONTEXTS, LENGTH = 4, 24

Checkpoint = tuple[JsonObject, Tensors]


@torch.no_grad()
def measure_difference(
    drafter: Drafter, before: Checkpoint, after: Checkpoint, embedding: torch.Tensor
) -> float | None:
    """Measure the largest difference of final hidden states, relative to the largest value.

    None for sliding windows, which the plain form has not.
    """
    if SLIDING in drafter.attention.layer_types:
        return None
    models = [_load(*before), _load(*after)]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(CONTEXTS):
        states = torch.randn(LENGTH, len(drafter.layer_ids), drafter.target_hidden_size, generator=generator)
        states *= torch.rand(LENGTH, 1, 1, generator=generator) * 20 + 0.1  # tokens' states differ in size
        anchor = int(torch.randint(drafter.target_vocab_size, (1,), generator=generator))
        first, second = (model.draft(anchor, states, drafter.max_gamma, embedding.float()) for model in models)
        worst = max(worst, float((first - second).abs().max() / first.abs().max()))
    return worst


def _load(config: ConfigJson, tensors: Tensors) -> LagunaDrafter:
    """Load the plain form of a checkpoint that is not on disk yet."""
    kind = SpeculatorsDrafter if "speculators_model_type" in config else LagunaDrafter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
        return kind.load(folder)
