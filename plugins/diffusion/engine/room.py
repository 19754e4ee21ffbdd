"""What there is room for beside the weights, once those are loaded: tokens' keys and values, and a pass's logits."""

from __future__ import annotations

import torch

from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.serving.machine.memory import available_bytes

# Of the free memory. A pass that opens blocks holds their keys and values a second time; logits have theirs.
SHARE, LOGITS_SHARE = 0.4, 0.15
LOGIT_BYTES = 4


def count_token_bytes(reference: Reference, *models: Llada) -> int:
    """Bytes of a token's keys and values in all models, with guidance twice; 0 without a cache."""
    if reference.cache == "none":
        return 0
    return (2 if reference.guidance else 1) * sum(map(_count, models))


def find_room(token_bytes: int, device: torch.device) -> int | None:
    """Find how many tokens fit into the device's free memory; None where nothing is kept of them."""
    if not token_bytes:
        return None
    return max(1, int(SHARE * _find_free(device)) // token_bytes)


def find_logit_room(reference: Reference, vocabulary: int, models: int, device: torch.device) -> int:
    """Find how many positions of open blocks may get logits in a pass, of a model and perhaps its draft."""
    # As a model gives them and in float32, with guidance twice; the last ones are kept for proposals.
    copies = 2 * models * (2 if reference.guidance else 1) + 1
    return max(1, int(LOGITS_SHARE * _find_free(device)) // (copies * LOGIT_BYTES * vocabulary))


def _find_free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def _count(model: Llada) -> int:
    config = model.config
    return 2 * config.n_layers * config.n_kv_heads * config.head_size * model.embedding.weight.element_size()
