"""Checkpoints without weights: XS.2's published shape, or a small one like it, for engines that make their weights up.

The tokenizer is the toy's, which knows 512 of the tokens: prompts are short and answers are not read. Of the drafter
there is a weight file as large as the real one's and without any content: what is checked before a start is its header,
and the table of its vocabulary, all zeros, says that draft token i is the target's token i.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from laguna_serve.bench.experiments.step import (
    DENSE_CONFIG,
    ROOT,
    XS2_DRAFT_RANDOM,
    XS2_FP8_PRUNED_RANDOM,
    XS2_FP8_RANDOM,
    XS2_PRUNED_RANDOM,
    XS2_RANDOM,
)
from laguna_serve.serving.checkpoint import ConfigJson
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.checkpoint.stored.drafter_weights import D2T, expected_tensors
from laguna_serve.serving.kit.files import write_json

RELEASES = ROOT / "tests" / "fixtures" / "releases"
TARGET, DRAFTER = RELEASES / "Laguna-XS.2", RELEASES / "Laguna-XS.2-speculator.dflash"
TARGET_FP8 = RELEASES / "Laguna-XS.2-FP8"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Of the blocks of routed experts, in both sizes.
PRUNED_SHARE = 0.1
BLOCK = 64
PER_LAYER = ("layer_types", "mlp_layer_types", "num_attention_heads_per_layer")
# What makes a target and a drafter small enough for a rehearsal, and is of the published kind in all else.
SMALL_LAYERS = 6
SMALL_TARGET: ConfigJson = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": SMALL_LAYERS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "sliding_window": 128,
}
SMALL_HEADS = 8
SMALL_DRAFT_LAYER: ConfigJson = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
SMALL_DRAFTER: ConfigJson = {"draft_vocab_size": 256, "aux_hidden_state_layer_ids": [1, 3, 6]}


def write_checkpoints(folder: Path, *, small: bool) -> None:
    """Write all of them, as subfolders named after their placeholders; those that are there are left.

    Raises:
        OSError: a published config is not there, or a file cannot be written.
    """
    target, fp8, drafter = _read(TARGET), _read(TARGET_FP8), _read(DRAFTER)
    if small:
        target, fp8, drafter = shrink_target(target), shrink_target(fp8), shrink_drafter(drafter)
    for placeholder, config in (
        (XS2_RANDOM, target),
        (XS2_PRUNED_RANDOM, prune(target)),
        (XS2_FP8_RANDOM, fp8),
        (XS2_FP8_PRUNED_RANDOM, prune(fp8, "fp8")),
        (DENSE_CONFIG, make_dense(target)),
        (XS2_DRAFT_RANDOM, drafter),
    ):
        to = folder / placeholder.strip("{}")
        if (to / "config.json").exists():
            continue
        to.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER:
            shutil.copyfile(ROOT / "tests" / "toy" / "teacher" / name, to / name)
        write_json(to / "config.json", config)
        if placeholder == XS2_DRAFT_RANDOM:
            write_empty_weights(to)


def shrink_target(config: ConfigJson) -> ConfigJson:
    """Keep the same kinds of layers, a few of each, narrow."""
    per_layer = {name: config[name][:SMALL_LAYERS] for name in PER_LAYER}
    heads = [count // SMALL_HEADS for count in per_layer["num_attention_heads_per_layer"]]
    per_layer["num_attention_heads_per_layer"] = heads
    return config | SMALL_TARGET | per_layer | {"num_attention_heads": heads[0]}


def shrink_drafter(config: ConfigJson) -> ConfigJson:
    """Shrink a drafter to one of the same kind for the small target."""
    return config | SMALL_DRAFTER | {"transformer_layer_config": config["transformer_layer_config"] | SMALL_DRAFT_LAYER}


def prune(config: ConfigJson, stored: str = "plain") -> ConfigJson:
    """Take PRUNED_SHARE of every layer's blocks away; the others are stored in that format."""
    blocks = config["moe_intermediate_size"] // BLOCK
    kept = round(config["num_experts"] * blocks * (1 - PRUNED_SHARE))
    layers = config["mlp_layer_types"].count("sparse")
    pruning = {"format": stored, "block_size": BLOCK, "blocks_per_expert": blocks, "kept_blocks": [kept] * layers}
    return config | {"architectures": ["LagunaSentinelForCausalLM"], "expert_pruning": pruning}


def make_dense(config: ConfigJson) -> ConfigJson:
    """Make the dense student's shape: every layer's feed-forward as wide as the first one's."""
    layers = config["num_hidden_layers"]
    return config | {"mlp_layer_types": ["dense"] * layers, "mlp_only_layers": list(range(layers))}


def write_empty_weights(folder: Path) -> None:
    """Write a drafter's weight file: its header and zeros that take no room on the disk."""
    end, header = 0, {}
    drafter = read_drafter(folder)
    shapes = {name: ("BF16", 2, shape) for name, shape in expected_tensors(drafter).items()}
    if drafter.draft_vocab_size != drafter.target_vocab_size:
        shapes[D2T] = ("I64", 8, (drafter.draft_vocab_size,))
    for name, (dtype, width, shape) in sorted(shapes.items(), key=lambda item: -item[1][1]):
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _read(folder: Path) -> ConfigJson:
    content: ConfigJson = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
