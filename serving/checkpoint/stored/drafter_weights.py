"""Checks that a drafter's safetensors hold what its config.json describes.

Read from the headers; of the tensors only the two vocabulary tables are opened.

vLLM names a missing or misshapen tensor at best as a KeyError deep in its loader, and an unsuitable `d2t` never.
Names and shapes are those that vLLM 0.32 loads (models/laguna_dflash.py and qwen3_dflash.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from laguna_serve.plugins.formats.sequential_head import HEAD as SEQUENTIAL_HEAD
from laguna_serve.plugins.formats.sequential_head import head_shapes
from laguna_serve.serving.checkpoint.drafter import LAGUNA, Drafter
from laguna_serve.serving.checkpoint.fields import CheckpointError
from laguna_serve.serving.checkpoint.stored.weight_files import (
    FETCH,
    OTHERS,
    TensorHeader,
    check_file,
    list_weights,
    read_headers,
)

PLAIN = ("BF16", "F16", "F32")
HEAD, D2T, T2D, EMBEDDING = "lm_head.weight", "d2t", "t2d", "embed_tokens.weight"
SEPARATE = "layers.0.self_attn.q_proj.weight"


def check_weights(folder: Path, drafter: Drafter) -> None:
    """Raise CheckpointError naming the first tensor that is missing or not as it must be.

    Weights in another format than safetensors, and quantised ones, are left to vLLM.
    """
    headers = read_headers(folder)
    if not headers:
        if any(next(folder.glob(pattern), None) is not None for pattern in OTHERS):
            return
        raise CheckpointError(f"{folder}: expected the drafter's weights (*.safetensors), got none; {FETCH}")
    if drafter.quantisation is not None:
        return  # other names and shapes, as many as there are methods: left to vLLM
    if drafter.format == LAGUNA and SEPARATE in headers:
        expected = "layers.0.self_attn.qkv_proj.weight, queries, keys and values in one"
        raise CheckpointError(
            f"{folder}: expected {expected}, got q_proj; join the three, as vLLM loads no others here"
        )
    if drafter.head_rank is None:
        stray = next((name for name in headers if name.startswith(f"{SEQUENTIAL_HEAD}.")), None)
        if stray is not None:
            expected = f"dflash_config.{SEQUENTIAL_HEAD} in a drafter's config.json with {stray}"
            raise CheckpointError(f"{folder}: expected {expected}, got none; {FETCH}")
    for name, shape in expected_tensors(drafter).items():
        header = headers.get(name)
        if header is None:
            raise CheckpointError(f"{folder}: expected tensor {name} {list(shape)}, got none; {FETCH}")
        _check_shape(folder, name, shape, header)
        if header.dtype not in PLAIN:
            expected = f"{name} in {', '.join(PLAIN)}, as config.json has no quantization_config"
            raise CheckpointError(f"{folder}: expected {expected}, got {header.dtype}; {FETCH}")
    if drafter.format == LAGUNA:
        return
    if EMBEDDING in headers:
        _check_shape(folder, EMBEDDING, (drafter.target_vocab_size, drafter.hidden_size), headers[EMBEDDING])
    _check_vocabulary(folder, drafter, headers)


def expected_tensors(drafter: Drafter) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor without which the drafter cannot be loaded."""
    H, N, a = drafter.hidden_size, drafter.intermediate_size, drafter.attention
    taps, D = len(drafter.layer_ids), drafter.attention.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (H, taps * drafter.target_hidden_size),
        "hidden_norm.weight": (H,),
        "norm.weight": (H,),
    }
    if drafter.format == LAGUNA:
        shapes |= {f"aux_hidden_norms.{tap}.weight": (drafter.target_hidden_size,) for tap in range(taps)}
    elif drafter.draft_vocab_size != drafter.target_vocab_size:
        shapes[HEAD] = (drafter.draft_vocab_size, H)
    if drafter.head_rank is not None:
        shapes |= head_shapes(drafter.draft_vocab_size, H, drafter.head_rank)
    for layer, heads in enumerate(a.heads):
        parts: dict[str, tuple[int, ...]] = {"input_layernorm": (H,), "post_attention_layernorm": (H,)}
        parts |= {"self_attn.q_norm": (D,), "self_attn.k_norm": (D,), "self_attn.o_proj": (H, heads * D)}
        if drafter.format == LAGUNA:
            parts["self_attn.qkv_proj"] = ((heads + 2 * a.kv_heads) * D, H)
        else:
            parts |= {f"self_attn.{part}_proj": (a.kv_heads * D, H) for part in ("k", "v")}
            parts["self_attn.q_proj"] = (heads * D, H)
        if a.gate:
            parts["self_attn.g_proj"] = (heads * a.gate, H)
        parts |= {"mlp.gate_proj": (N, H), "mlp.up_proj": (N, H), "mlp.down_proj": (H, N)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], header: TensorHeader) -> None:
    if header.shape != shape:
        remedy = "is config.json that of these weights?"
        raise CheckpointError(f"{folder}: expected {name} {list(shape)}, got {list(header.shape)}; {remedy}")


def _check_vocabulary(folder: Path, drafter: Drafter, headers: dict[str, TensorHeader]) -> None:
    """Check the draft vocabulary's table to the target's, and the one back, where it is there.

    The first, `d2t`, has differences.
    """
    V, size = drafter.target_vocab_size, drafter.draft_vocab_size
    if D2T not in headers:
        if size != V:
            expected = f"{D2T}, which of the target's {V} tokens the {size} drafted ones are"
            raise CheckpointError(f"{folder}: expected {expected}, got none; {FETCH}")
        return
    if size == V:
        expected = f"no {D2T} where all of the target's {V} tokens are drafted, as vLLM has no place for it there"
        raise CheckpointError(f"{folder}: expected {expected}, got one; take it out of the weights")
    _check_shape(folder, D2T, (size,), headers[D2T])
    tokens = _read(folder, D2T).astype(np.int64) + np.arange(size)
    strays = tokens[(tokens < 0) | (tokens >= V)]
    if len(strays):
        expected = f"{D2T} to lead to the target's tokens 0 to {V - 1}"
        raise CheckpointError(f"{folder}: expected {expected}, got {int(strays[0])}; is it for this model?")
    if len(np.unique(tokens)) != size:
        values, counts = np.unique(tokens, return_counts=True)
        expected = f"{D2T} to lead to {size} different tokens"
        raise CheckpointError(
            f"{folder}: expected {expected}, got {int(values[counts.argmax()])} more than once; {FETCH}"
        )
    if T2D in headers:
        _check_shape(folder, T2D, (V,), headers[T2D])
        listed = np.flatnonzero(_read(folder, T2D))
        if not np.array_equal(listed, np.sort(tokens)):
            expected = f"{T2D} to mark the {size} tokens of {D2T}"
            raise CheckpointError(f"{folder}: expected {expected}, got {len(listed)} others or fewer; {FETCH}")


def _read(folder: Path, name: str) -> np.ndarray[Any, Any]:
    path = next(path for path in list_weights(folder) if name in check_file(path))
    with safe_open(path, framework="np") as file:
        tensor: np.ndarray[Any, Any] = file.get_tensor(name)
        return tensor
