"""A DFlash drafter in the speculators format: Qwen3's layers and a head of its own over a reduced vocabulary.

It differs from dflash.py's in four things: the target's hidden states go into `fc` as they are; `hidden_norm` is the
only norm between `fc` and the layers' keys and values; heads have no gate; the head knows only the draft vocabulary,
whose token i is the target's i + d2t[i]. Weights are named as vLLM's `DFlashQwen3ForCausalLM` reads them; the
embedding is the target's. Layer ids in the file count from 1.

Source: models/qwen3_dflash.py and transformers_utils/configs/speculators/algos.py of vLLM 0.32.0.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from laguna_serve.plugins.layers import FULL, SLIDING
from laguna_serve.scripts.checkpoints.drafters.dflash import (
    IGNORED,
    DrafterLayer,
    LagunaDrafter,
    Norm,
    linear,
)
from laguna_serve.scripts.checkpoints.drafters.layout import SHARED_KEYS, describe_speculators
from laguna_serve.scripts.checkpoints.drafters.shape import MAX_POSITIONS, DrafterShape
from laguna_serve.scripts.checkpoints.headers import read_tensors
from laguna_serve.serving.checkpoint import ConfigJson

DEFAULT_ROPE_THETA = 1e6  # vLLM's, for a config that names none
SPLIT = ("q_proj", "k_proj", "v_proj")


class SpeculatorsDrafter(LagunaDrafter):
    """The drafter with its head; `vocabulary` [V'] int64 are the target's tokens that it can draft, rising.

    Without a head of its own it uses the target's.
    """

    def __init__(self, shape: DrafterShape, vocabulary: torch.Tensor, own_head: bool = True) -> None:
        nn.Module.__init__(self)
        self.shape = shape
        self.fc = linear(shape.hidden_size * len(shape.target_layer_ids), shape.hidden_size)
        self.hidden_norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(shape, laguna_style=False) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = linear(shape.hidden_size, len(vocabulary)) if own_head else None
        self.sequential_head = None  # the format has no place for one
        to_draft = torch.full((shape.vocab_size,), IGNORED)
        to_draft[vocabulary] = torch.arange(len(vocabulary))
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.register_buffer("to_draft", to_draft, persistent=False)

    def forward(
        self,
        block: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        context_positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Compute final hidden states of a block, shapes as `LagunaDrafter.forward`."""
        context = self.hidden_norm(self.fc(hidden_states.flatten(2)))
        x = block
        for layer in self.layers:
            x = layer(x, positions, context, context_positions, mask)
        out: torch.Tensor = self.norm(x)
        return out

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Logits [..., V'] over the draft vocabulary."""
        return F.linear(hidden, head if self.lm_head is None else self.lm_head.weight)

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the draft vocabulary's number of each token, `IGNORED` for one that it lacks."""
        return self.get_buffer("to_draft")[tokens]

    def propose(
        self, anchor: int, hidden_states: torch.Tensor, gamma: int, embedding: torch.Tensor, head: torch.Tensor
    ) -> list[int]:
        """Propose as `Drafter.propose` does, in the target's tokens."""
        drafted = super().propose(anchor, hidden_states, gamma, embedding, head)
        tokens: list[int] = self.get_buffer("vocabulary")[drafted].tolist()
        return tokens

    def config(self, verifier: str) -> ConfigJson:
        """Return the checkpoint's config.json; `verifier` names the target."""
        shape = self.shape
        sizes = asdict(shape) | {"max_position_embeddings": MAX_POSITIONS}
        layers = {name: sizes[name] for name in SHARED_KEYS} | {
            "layer_types": [FULL] * shape.num_hidden_layers,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "partial_rotary_factor": shape.partial_rotary_factor,
            },
        }
        return describe_speculators(
            layers,
            verifier=verifier,
            draft_vocab_size=len(self.get_buffer("vocabulary")),
            target_hidden_size=shape.hidden_size,
            layer_ids=shape.target_layer_ids,
            block_size=shape.block_size,
            mask_token_id=shape.mask_token_id,
            causal=shape.causal,
        )

    def list_tensors(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """List what model.safetensors holds, on the CPU; queries, keys and values apart."""
        tensors: dict[str, torch.Tensor] = {}
        sizes = [self.shape.num_attention_heads, *[self.shape.num_key_value_heads] * 2]
        for name, stored in super().list_tensors(dtype).items():
            if ".qkv_proj." not in name:
                tensors[name] = stored
                continue
            for part, rows in zip(SPLIT, stored.split([n * self.shape.head_dim for n in sizes]), strict=True):
                tensors[name.replace("qkv_proj", part)] = rows.contiguous()
        return tensors | list_tables(self.get_buffer("vocabulary").cpu(), self.shape.vocab_size)

    def save(self, folder: Path, verifier: str = "teacher") -> None:
        """Write config.json and model.safetensors (bf16)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.list_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config(verifier), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SpeculatorsDrafter:
        """Read a checkpoint in this format, as fp32."""
        config = json.loads((folder / "config.json").read_text())
        layers = config["transformer_layer_config"]
        rope = layers.get("rope_parameters") or {"rope_theta": layers.get("rope_theta", DEFAULT_ROPE_THETA)}
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        shape = DrafterShape(
            **{name: layers[name] for name in (*names, "head_dim", "intermediate_size", "rms_norm_eps")},
            target_layer_ids=tuple(layer - 1 for layer in config["aux_hidden_state_layer_ids"]),
            mask_token_id=config["mask_token_id"],
            block_size=config["block_size"],
            rope_theta=rope["rope_theta"],
            partial_rotary_factor=rope.get("partial_rotary_factor", 1.0),
            causal=not config.get("sliding_window_non_causal", True),
            sliding_window=layers["sliding_window"] if SLIDING in (layers.get("layer_types") or []) else None,
        )
        tensors = read_tensors(folder)
        d2t = tensors.pop("d2t", torch.zeros(config["draft_vocab_size"], dtype=torch.int64))
        tensors.pop("t2d", None)
        tensors.pop("embed_tokens.weight", None)
        drafter = cls(shape, d2t + torch.arange(len(d2t)), own_head="lm_head.weight" in tensors)
        for number in range(shape.num_hidden_layers):
            prefix = f"layers.{number}.self_attn"
            parts = [tensors.pop(f"{prefix}.{part}.weight") for part in SPLIT]
            tensors[f"{prefix}.qkv_proj.weight"] = torch.cat(parts)
        drafter.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return drafter.eval()


def list_tables(vocabulary: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """List a draft vocabulary's tables; none where all of the target's tokens are drafted: vLLM refuses them there."""
    if len(vocabulary) == vocab_size:
        return {}
    drafted = torch.isin(torch.arange(vocab_size), vocabulary)
    return {"d2t": vocabulary - torch.arange(len(vocabulary)), "t2d": drafted}


def choose_vocabulary(tokens: torch.Tensor, size: int, vocab_size: int) -> torch.Tensor:
    """Choose the `size` tokens that are most frequent in `tokens` [N], rising; of equal ones the lower first."""
    counts = torch.bincount(tokens, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def start_head(drafter: SpeculatorsDrafter, head: torch.Tensor) -> None:
    """Begin with the target's rows of its head [V, H]."""
    assert drafter.lm_head is not None
    drafter.lm_head.weight.data.copy_(F.embedding(drafter.get_buffer("vocabulary"), head))
