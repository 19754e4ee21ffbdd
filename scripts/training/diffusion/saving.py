"""Writing LLaDA checkpoints under the published keys and names."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig
from laguna_serve.scripts.checkpoints.output import save_checkpoint, write_tensors
from laguna_serve.serving.kit.files import write_text

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What the published config.json says besides the shape, and other programs look at.
KEYS = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "use_cache": False,
}


def write_checkpoint(folder: Path, config: LladaConfig, state: dict[str, torch.Tensor], tokenizer: Path) -> None:
    """Write the tensors in bfloat16 as one file, config.json, and the tokenizer's files of another folder.

    Raises:
        CheckpointError: it cannot be written; what was there before stays.
    """
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}

    def save(partial: Path) -> None:
        write_tensors(partial / "model.safetensors", tensors)
        write_config(partial, config)
        copy_tokenizer(tokenizer, partial)

    save_checkpoint(folder, save)


def write_config(folder: Path, config: LladaConfig) -> None:
    """Write config.json under the published keys."""
    write_text(folder / "config.json", json.dumps(KEYS | asdict(config) | {"torch_dtype": "bfloat16"}, indent=1) + "\n")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, those that there are."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
