"""LLaDA in vLLM as a mask predictor: Llama's layers seeing both ways, a pooling model that gives every token's logits.

vLLM's own engine decodes causal models; this is no decode but its oracle and a second backend: one state of a canvas is
one pooling request (`plugins/diffusion/vllm_model.py`), without a cache. The published checkpoint needs its own
code in transformers; its configuration is read here instead.

Checked against vLLM 0.32.0: `LlamaForCausalLM`, `pooler_for_token_classify`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.tokwise.poolers import pooler_for_token_classify
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.llama import LlamaForCausalLM

from laguna_serve.plugins.diffusion.checkpoint import read_config
from laguna_serve.plugins.formats.completeness import refuse_incomplete

ARCHITECTURE = "LLaDAModelLM"
# The published names' last part but one, of the ends and of a layer → the Llama's.
ENDS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def rename(name: str) -> str:
    """Give a published tensor's name in a Llama: model.transformer.blocks.0.ff_out.weight and so on."""
    *place, part, kind = name.removeprefix("model.transformer.").split(".")
    if not place:
        return f"{ENDS[part]}.{kind}"
    return f"model.layers.{place[-1]}.{LAYER[part]}.{kind}"


def describe(folder: Path) -> LlamaConfig:
    """Describe a LLaDA checkpoint as a Llama of vLLM's whose tokens see each other.

    Raises:
        DiffusionError: the folder holds no LLaDA that is carried.
    """
    shape = read_config(folder)
    return LlamaConfig(
        architectures=[ARCHITECTURE],
        hidden_size=shape.d_model,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        num_hidden_layers=shape.n_layers,
        intermediate_size=shape.mlp_hidden_size,
        vocab_size=shape.embedding_size,
        rms_norm_eps=shape.rms_norm_eps,
        max_position_embeddings=shape.max_sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.weight_tying,
        eos_token_id=shape.eos_token_id,
        is_causal=False,
    )


@default_pooling_type(tok_pooling_type="ALL")
class LladaForMaskPrediction(LlamaForCausalLM):  # type: ignore[misc]
    """Logits [tokens, vocabulary] of whole sequences, under the task `token_classify` without activation."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        pooler_config = vllm_config.model_config.pooler_config
        assert pooler_config is not None, "it is served with --runner pooling"
        self.pooler = pooler_for_token_classify(pooler_config, classifier=self._read_out)

    def _read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden.to(self.lm_head.weight.dtype))
        return logits

    @partial(refuse_incomplete, rename=rename)
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors by the published names."""
        loaded: set[str] = super().load_weights((rename(name), tensor) for name, tensor in weights)
        return loaded
