"""A DFlash drafter in plain PyTorch: the reference for what vLLM computes, and what the toy drafter is trained with.

A block is [anchor, mask × γ] at positions a … a+γ, a being the newest token the target has emitted. Its rows attend to
each other without a causal mask, and to keys and values made from the target's hidden states at positions < a (the
anchor's own hidden state does not exist yet when drafting starts). Row k predicts token a+k. Embedding and output
head are the target's. Weights are named as vLLM's `DFlashLagunaForCausalLM` reads them.

Source: DFlash (arXiv:2602.06036); models/laguna_dflash.py and v1/spec_decode/dflash.py of vLLM 0.32.0.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from laguna_serve.plugins.models.dflash_head import SequentialHead
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.checkpoints.headers import read_tensors

IGNORED = -100  # a label that no loss counts


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.04)
    return layer


class DrafterAttention(nn.Module):
    """Block rows attend to the context's keys and values and to each other's; a gate may scale each head's output."""

    def __init__(self, shape: DrafterShape, gated: bool) -> None:
        super().__init__()
        heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.qkv_proj = linear(shape.hidden_size, (heads + 2 * kv_heads) * dim)
        self.o_proj = linear(heads * dim, shape.hidden_size)
        self.g_proj = linear(shape.hidden_size, heads) if gated else None
        self.q_norm, self.k_norm = Norm(dim, shape.rms_norm_eps), Norm(dim, shape.rms_norm_eps)
        rotary = int(dim * shape.partial_rotary_factor)
        frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, rotary, 2).float() / rotary)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of the first channels of x [B, T, heads, dim] at positions [B, T]."""
        angles = positions[..., None].float() * self.get_buffer("frequencies")
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        a, b, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def keys_values(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv = F.linear(x, self.qkv_proj.weight[self.heads * self.dim :]).view(*x.shape[:2], 2, self.kv_heads, self.dim)
        keys, values = kv.unbind(2)
        return self.rotate(self.k_norm(keys), positions), values

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        queries = F.linear(x, self.qkv_proj.weight[: self.heads * self.dim]).view(*x.shape[:2], self.heads, self.dim)
        queries = self.rotate(self.q_norm(queries), positions)
        own = self.keys_values(x, positions)
        keys, values = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(context, own, strict=True))
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask[:, None], enable_gqa=True
        ).transpose(1, 2)
        if self.g_proj is not None:
            mixed = mixed * F.softplus(self.g_proj(x).float()).to(x.dtype)[..., None]
        out: torch.Tensor = self.o_proj(mixed.flatten(2))
        return out


class Mlp(nn.Module):
    """A SwiGLU block: down(silu(gate(x)) · up(x))."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.gate_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DrafterLayer(nn.Module):
    """One drafter layer.

    In Laguna's style heads may be gated, and the context passes through the layer's own input norm as the block does;
    in Qwen3's there is no gate, and the context comes normalised already.
    """

    def __init__(self, shape: DrafterShape, laguna_style: bool = True) -> None:
        super().__init__()
        self.laguna_style = laguna_style
        self.self_attn, self.mlp = DrafterAttention(shape, gated=laguna_style and shape.gated), Mlp(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        context: torch.Tensor,
        context_positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        context = self.input_layernorm(context) if self.laguna_style else context
        cached = self.self_attn.keys_values(context, context_positions)
        x = x + self.self_attn(self.input_layernorm(x), positions, cached, mask)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LagunaDrafter(nn.Module):
    """The drafter without embedding and head, which are the target's."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.shape = shape
        taps = len(shape.target_layer_ids)
        self.aux_hidden_norms = nn.ModuleList(Norm(shape.hidden_size, shape.rms_norm_eps) for _ in range(taps))
        self.fc = linear(shape.hidden_size * taps, shape.hidden_size)
        self.hidden_norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.sequential_head: SequentialHead | None = None
        if shape.head_rank is not None:
            self.add_head(shape.head_rank)

    def add_head(self, rank: int) -> None:
        """Give it a sequential head, which has no effect yet."""
        self.shape = replace(self.shape, head_rank=rank)
        self.sequential_head = SequentialHead(self.shape.vocab_size, self.shape.hidden_size, rank)

    def forward(
        self,
        block: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        context_positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Compute final hidden states [B, Q, H] of block rows, ready for the target's head.

        block [B, Q, H] embeddings, positions [B, Q]; hidden_states [B, T, taps, H] of the target, context_positions
        [B, T]; mask [B, Q, T + Q] bool, true where a block row may look.
        """
        normed = [norm(hidden_states[:, :, i]) for i, norm in enumerate(self.aux_hidden_norms)]
        context = self.hidden_norm(self.fc(torch.cat(normed, dim=-1)))
        x = block
        for layer in self.layers:
            x = layer(x, positions, context, context_positions, mask)
        out: torch.Tensor = self.norm(x)
        return out

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of final hidden states [..., H] through the target's head [V, H], without the drafter's."""
        return F.linear(hidden, head)

    def condition(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Complete the logits [..., γ, V] of blocks with the tokens before each place [..., γ], the anchor's first."""
        return logits if self.sequential_head is None else logits + self.sequential_head(hidden, previous)

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the logits are to predict for the target's tokens, or `IGNORED` where they cannot."""
        return tokens

    @torch.no_grad()
    def propose(
        self, anchor: int, hidden_states: torch.Tensor, gamma: int, embedding: torch.Tensor, head: torch.Tensor
    ) -> list[int]:
        """Propose γ greedy tokens after `anchor`, given the target's states [T, taps, H] of all tokens before it."""
        hidden = self.draft(anchor, hidden_states, gamma, embedding)
        logits = self.logits(hidden, head)
        proposed: list[int] = []
        for place in range(gamma):
            previous = torch.tensor([anchor, *proposed])
            known = self.condition(logits[: place + 1], hidden[: place + 1], previous)
            proposed.append(int(known[place].argmax()))
        return proposed

    @torch.no_grad()
    def draft(self, anchor: int, hidden_states: torch.Tensor, gamma: int, embedding: torch.Tensor) -> torch.Tensor:
        """Compute final hidden states [γ, H] of the mask rows after `anchor`."""
        length = hidden_states.shape[0]
        block = torch.full((1, gamma + 1), self.shape.mask_token_id)
        block[0, 0] = anchor
        rows = torch.arange(length, length + gamma + 1)[None]
        mask = self.shape.make_mask(length, gamma)[None]
        x = self(F.embedding(block, embedding), rows, hidden_states[None], torch.arange(length)[None], mask)
        out: torch.Tensor = x[0, 1:]
        return out

    def list_tensors(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """List what model.safetensors holds, on the CPU."""
        return {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (bf16)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.list_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.shape.config(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> LagunaDrafter:
        """Read a checkpoint in this format, as fp32."""
        drafter = cls(DrafterShape.from_config(json.loads((folder / "config.json").read_text())))
        drafter.load_state_dict({k: v.float() for k, v in read_tensors(folder).items()})
        return drafter.eval()


class TapReader:
    """Collects a target's hidden states after the given layers while it runs."""

    def __init__(self, target: nn.Module, layer_ids: tuple[int, ...]) -> None:
        self.layer_ids = layer_ids
        self.seen: dict[int, torch.Tensor] = {}
        self.handles = [target.model.layers[i].register_forward_hook(self._hook(i)) for i in layer_ids]  # type: ignore

    def _hook(self, layer_id: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.seen[layer_id] = output[0] if isinstance(output, tuple) else output

        return keep

    def read(self) -> torch.Tensor:
        """Read the last run's states [B, T, taps, H]."""
        return torch.stack([self.seen[i] for i in self.layer_ids], dim=2)
