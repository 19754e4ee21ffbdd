"""LLaDA's transformer: Llama's, without a causal mask, under the published names of tensors.

A position sees all positions. The modules here are the weights and the arithmetic of one layer; `forward` runs whole
sequences of one length, for training and for scoring, and `passes.py` runs unlike rows with bits of their own.

Source: arXiv:2502.09992; the names are those of GSAI-ML/LLaDA-8B-Instruct's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig, Tensors, read_config
from laguna_serve.plugins.diffusion.errors import DiffusionError


class RMSNorm(nn.Module):
    """x ÷ its root mean square over the last axis, in fp32, times a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm [..., size], in x's dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Rotary(nn.Module):
    """Angles of positions: cosines and sines [positions, head], fp32, made once for the longest sequence.

    A table made anew for each length would round by the length, as a processor's vector and scalar cosines differ.
    """

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        self.cosines: torch.Tensor
        self.sines: torch.Tensor
        half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        angles = torch.outer(torch.arange(config.max_sequence_length, dtype=torch.float32), config.rope_theta**-half)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [..., head] of positions [...] int64."""
        return self.cosines[positions], self.sines[positions]


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn x [..., n, heads, head] by the angles of its positions [..., n, head], in fp32."""
    wide = x.float()
    low, high = wide.chunk(2, -1)
    turned = wide * cosines.unsqueeze(-2) + torch.cat([-high, low], -1) * sines.unsqueeze(-2)
    return turned.to(x.dtype)


class Block(nn.Module):
    """One layer: attention over whatever keys it is given, then a gated feed-forward part."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        size, wide, self.head_size = config.d_model, config.mlp_hidden_size, config.head_size
        keys = config.n_kv_heads * config.head_size
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.ff_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_proj = nn.Linear(size, wide, bias=False)
        self.up_proj = nn.Linear(size, wide, bias=False)
        self.ff_out = nn.Linear(wide, size, bias=False)

    def project(
        self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give queries, keys and values [..., n, heads, head] of x [..., n, d], the first two turned by position."""
        normed = self.attn_norm(x)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head_size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        turned = rotate(torch.cat([q, k], -2), cosines, sines)
        return turned[..., : q.shape[-2], :], turned[..., q.shape[-2] :, :], v

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """Activations silu(gate) · up [..., n, wide] of the feed-forward part, for x [..., n, d] after attention."""
        normed = self.ff_norm(x)
        activations: torch.Tensor = F.silu(self.ff_proj(normed)) * self.up_proj(normed)
        return activations

    def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Give the layer's output [..., n, d] for its input x and the attention's `mixed` [..., n, heads, head]."""
        x = x + self.attn_out(mixed.flatten(-2))
        out: torch.Tensor = x + self.ff_out(self.gate(x))
        return out

    def forward(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, causal: bool) -> torch.Tensor:
        """Run the layer on whole sequences [B, n, d], all positions seen, or in training those before."""
        q, k, v = self.project(x, cosines, sines)
        return self.finish(x, attend(q, k, v, causal))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Attention [B, n, heads, head] of q [B, n, heads, head] over k and v [B, m, kv_heads, head]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2)


class Llada(nn.Module):
    """The model. Its state's names are a checkpoint's."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        self.config = config
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.rotary = Rotary(config)

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers from the first to the last."""
        blocks: Iterable[Block] = self._part("blocks")
        return blocks

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the ids' vectors."""
        embedding: nn.Embedding = self._part("wte")
        return embedding

    def _part(self, name: str) -> Any:
        transformer = self.model["transformer"]
        assert isinstance(transformer, nn.ModuleDict)
        return transformer[name]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed ids [...] int64 as [..., d]."""
        embedded: torch.Tensor = self.embedding(ids)
        return embedded

    def read_out(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits [..., vocab_size] fp32 of the last layer's x [..., d]."""
        head = self.embedding if self.config.weight_tying else self._part("ff_out")
        logits = F.linear(self._part("ln_f")(x), head.weight)
        return logits[..., : self.config.vocab_size].float()

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        """Logits fp32 of whole sequences ids [B, n] int64.

        Args:
            wanted: [B, n] bool; of these positions alone, [wanted, vocab_size] instead of [B, n, vocab_size].
            causal: a position sees those up to itself alone, which no LLaDA does: to start one from.
        """
        x = self.embed(ids)
        cosines, sines = self.rotary(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, cosines, sines, causal)
        return self.read_out(x if wanted is None else x[wanted])


def require_device(device: str) -> None:
    """Raise DiffusionError for a GPU that torch cannot use."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DiffusionError("--device: expected a GPU that torch can use, got none; leave it out for the CPU")


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llada:
    """Load a checkpoint, tensor by tensor, in `dtype`, ready to decode.

    Raises:
        DiffusionError: the checkpoint cannot be used, or there is no such device.
    """
    require_device(device)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llada(config)
    with Tensors(folder) as tensors:
        for name, empty in model.state_dict().items():
            tensor = tensors.read(name, tuple(empty.shape), dtype).to(device)
            model.load_state_dict({name: tensor}, strict=False, assign=True)
    model.rotary = Rotary(config).to(device)
    return model.eval().requires_grad_(False)
