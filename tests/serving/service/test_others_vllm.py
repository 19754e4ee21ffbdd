"""Models that are no Laguna, small ones with random weights: `laguna serve`'s engine gives transformers' tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from laguna_serve.scripts.dante.toy import serve_student
from laguna_serve.scripts.training.dante.records import Prompt
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer

TOY = Path(__file__).resolve().parents[2] / "toy"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [Qwen3Config(**SIZES), Qwen3MoeConfig(**SIZES, **MIXTURE)], ids=lambda config: config.model_type
)
def test_tokens_are_transformers(tmp_path: Path, config: Qwen3Config | Qwen3MoeConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # answers differ
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    load_tokenizer(TOY / "teacher").save_pretrained(tmp_path)
    prompts: list[Prompt] = ["def f(x):\n", "import os\n\n\ndef main() -> None:\n", "x = 1\n" * 40]
    prompts.append(({"role": "user", "content": "Complete this function:\ndef f():"},))
    served = serve_student(tmp_path, prompts, tmp_path / "engine.log", tokens=16)
    assert (served.answers, served.tokens, served.different) == (4, 64, 0), "see the log beside it"
