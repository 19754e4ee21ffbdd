"""A LLaDA of random weights that fits into a test, with a tokenizer of bytes and a chat template."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.plugins.diffusion.model import Llada

SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>", "<|role|>")
START, END, MASK, END_OF_TURN, ROLE = range(5)
VOCABULARY = len(SPECIAL) + 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token; five more are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[START],
        eos_token=SPECIAL[END],
        additional_special_tokens=list(SPECIAL[2:]),
    )
    made.chat_template = template
    return made


def write_llada(folder: Path, *, seed: int = 0, error: float = 0.0, template: str | None = TEMPLATE) -> Path:
    """A checkpoint that writes letters; `error`: noise on the weights, so that it is a draft of the one without."""
    config = LladaConfig(
        d_model=32,
        n_heads=4,
        n_kv_heads=4,
        n_layers=2,
        mlp_hidden_size=48,
        vocab_size=VOCABULARY,
        embedding_size=VOCABULARY + 3,
        mask_token_id=MASK,
        eos_token_id=END,
        max_sequence_length=256,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Llada(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    tokenizer = make_tokenizer(template)
    readable = [*tokenizer.encode("abcdefghijklmnopqrstuvwxyz .,\n"), END_OF_TURN]
    head = model.model["transformer"]["ff_out"].weight  # type: ignore[index]
    silent = torch.ones(config.embedding_size, dtype=torch.bool)
    silent[readable] = False
    head.data[silent] = 0.0
    tensors = {
        name: (tensor + error * torch.randn(tensor.shape, generator=generator)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    keys = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "bfloat16", **asdict(config)}
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    return folder
