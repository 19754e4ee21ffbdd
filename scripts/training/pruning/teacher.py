"""The model whose experts are scored or pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laguna_serve.scripts.training.pruning.streaming.layers import Layers


def load_model(folder: Path, threads: int) -> tuple[Any, Any]:
    """Load transformers' Laguna in fp32 on the CPU, and its tokenizer."""
    import torch
    import transformers

    from laguna_serve.scripts.training.pruning.streaming.layers import read_laguna

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LagunaForCausalLM.from_pretrained(folder, config=read_laguna(folder), dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def join_layers(layers: Layers) -> Any:
    """Put transformers' Laguna together from its layers, FP8 ones dequantised; in their dtype, on their device.

    Raises:
        CheckpointError: a tensor is missing, or not of the shape that config.json says.
    """
    import torch
    from transformers import LagunaForCausalLM
    from transformers.models.laguna.modeling_laguna import LagunaRotaryEmbedding

    with torch.device("meta"):
        model = LagunaForCausalLM(layers.config)
    head = layers.load_head()
    model.model.embed_tokens.weight = torch.nn.Parameter(layers.load_embedding(), requires_grad=False)
    model.lm_head.weight = torch.nn.Parameter(head.weight, requires_grad=False)
    model.model.norm = head.norm
    model.model.rotary_emb = LagunaRotaryEmbedding(layers.config).to(layers.device)
    for number in range(layers.config.num_hidden_layers):
        model.model.layers[number] = layers.load(number)
    return model.eval()
