"""Synthetic Laguna checkpoints for the tests of `laguna compact`: any size, any spelling, experts across shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from laguna_serve.plugins.pruning import draw_random_mask, read_shape

RELEASES = Path(__file__).resolve().parents[2] / "fixtures" / "releases"
E, N, H, B = 4, 16, 8, 4


def config(hidden: int = H, width: int = N, experts: int = E, layers: int = 3) -> dict[str, Any]:
    """A dense layer, then sparse ones."""
    return {
        "architectures": ["LagunaForCausalLM"],
        "model_type": "laguna",
        "dtype": "bfloat16",
        "vocab_size": 32,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 8,
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
    }


def weights(cfg: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random tensors of such a model, per expert, all that `count_parameters` counts."""
    generator = torch.Generator().manual_seed(0)
    hidden, D, kv = cfg["hidden_size"], cfg["head_dim"], cfg["num_key_value_heads"]
    heads, width = cfg["num_attention_heads"], cfg["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (cfg["vocab_size"], hidden),
        "lm_head.weight": (cfg["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer, kind in enumerate(cfg["mlp_layer_types"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        attention = {"q_proj": (heads * D, hidden), "k_proj": (kv * D, hidden), "v_proj": (kv * D, hidden)}
        attention |= {"o_proj": (hidden, heads * D), "g_proj": (heads, hidden), "q_norm": (D,), "k_norm": (D,)}
        shapes |= {f"{prefix}.self_attn.{name}.weight": size for name, size in attention.items()}
        mlps = {"mlp": cfg["intermediate_size"]}
        if kind == "sparse":
            mlps = {f"mlp.experts.{expert}": width for expert in range(cfg["num_experts"])}
            mlps["mlp.shared_expert"] = cfg["shared_expert_intermediate_size"]
            shapes[f"{prefix}.mlp.gate.weight"] = (cfg["num_experts"], hidden)
            shapes[f"{prefix}.mlp.experts.e_score_correction_bias"] = (cfg["num_experts"],)
        for name, size in mlps.items():
            shapes |= {f"{prefix}.{name}.{part}_proj.weight": (size, hidden) for part in ("gate", "up")}
            shapes[f"{prefix}.{name}.down_proj.weight"] = (hidden, size)
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in shapes.items()}


def quantise(cfg: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same in FP8 as released: random payload and scales for every feed-forward matrix, and the KV cache's."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, tensor in tensors.items():
        if not re.search(r"mlp\..*(gate|up|down)_proj\.weight$", name):
            made[name] = tensor
            continue
        made[name] = (tensor.float() * 20).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in tensor.shape]
        made[f"{name}_scale"] = (torch.rand(blocks, generator=generator) / 100 + 0.01).bfloat16()
    for layer in range(cfg["num_hidden_layers"]):
        made |= {f"model.layers.{layer}.self_attn.{part}_scale": torch.ones(1).bfloat16() for part in "kv"}
    released = json.loads((RELEASES / "Laguna-XS.2-FP8" / "config.json").read_text())
    return cfg | {"quantization_config": released["quantization_config"]}, made


def write_base(folder: Path, cfg: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder. Shards are cut by size in name order, so a layer's experts lie in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    seen = 0
    for name in sorted(tensors):
        parts[min(shards - 1, seen * shards // total)][name] = tensors[name]
        seen += tensors[name].nbytes
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def fuse(cfg: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' own spelling of the same weights."""
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name and "shared_expert." not in name}
    for name, tensor in tensors.items():
        if "shared_expert." in name:
            out[name.replace("shared_expert.", "shared_experts.")] = tensor
        if name.endswith("experts.e_score_correction_bias"):
            out[name.replace("experts.", "gate.")] = tensor
    for layer, kind in enumerate(cfg["mlp_layer_types"]):
        if kind == "sparse":
            prefix = f"model.layers.{layer}.mlp.experts"
            each = [[tensors[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(E)]
            out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
            out[f"{prefix}.down_proj"] = torch.stack([down for _, _, down in each])
    return out


def write_masks(folder: Path, cfg: dict[str, Any], ratio: float = 0.4, block: int = B) -> list[str]:
    """A random mask over shuffled groups; returns the flags that name the files."""
    shape = read_shape(cfg, "synthetic")
    L, groups = len(shape.layers), shape.intermediate_size // block
    keep = draw_random_mask(shape, groups, ratio, seed=3)
    noise = np.random.default_rng(4).random((L, shape.num_experts, shape.intermediate_size))
    indices = noise.argsort(-1).reshape(L, shape.num_experts, groups, block)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "keep.npy", keep)
    np.save(folder / "indices.npy", indices)
    return ["--keep-mask", str(folder / "keep.npy"), "--group-indices", str(folder / "indices.npy")]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return found
