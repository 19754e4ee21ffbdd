"""Random weights for a dense Laguna's config, padded like the published student.

For timing at full size without its download. Layers keep the widths given with --width, the rest of every layer is
zeros. Written in shards of a few layers; the config's folder may hold a tokenizer, which is copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors.torch import save_file

from laguna_serve.plugins.layers import list_heads
from laguna_serve.plugins.padding import is_dense
from laguna_serve.scripts.checkpoints.headers import INDEX
from laguna_serve.scripts.checkpoints.output import check_space, is_free, save_checkpoint
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, read_config
from laguna_serve.serving.checkpoint.target import is_drafter
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag
from laguna_serve.serving.kit.run_dir import check_out

STD = 0.02
LEFT = "nothing is left of it; the same command starts anew"
LAYERS_PER_SHARD = 4
EXAMPLES = """examples:
  python scripts/generate_dense.py FOLDER_WITH_CONFIG --width 1-39=4608 --out student    the published student's shape
  python scripts/generate_dense.py FOLDER_WITH_CONFIG --out unpadded                     no padding

exit status: 0 written, 2 it could not run, 130 interrupted
"""


def parse_width(text: str) -> tuple[range, int]:
    """LAYER=N or FIRST-LAST=N: layers and their width."""
    place, separator, width = text.partition("=")
    first, _, last = place.partition("-")
    if not separator or not all(part.isdecimal() for part in (first, last or first, width)) or int(width) < 1:
        raise argparse.ArgumentTypeError(f"expected LAYER=N or FIRST-LAST=N, got {text!r}; for example 1-39=4608")
    return range(int(first), int(last or first) + 1), int(width)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(BoundedConfig):
    """A dense Laguna's config, and how wide its layers really are."""

    config: Annotated[Path, Flag("folder with the config.json of a dense Laguna", positional=True)]
    out: Annotated[Path, Flag("folder for the checkpoint, empty or not there")]
    width: Annotated[
        tuple[tuple[range, int], ...],
        Flag(
            "true width of a layer or of several, FIRST-LAST=N (repeatable; default: the stored one)",
            metavar="LAYER=N",
            parse=parse_width,
            repeated=True,
        ),
    ] = ()
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0


class GenerateResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.generate_dense/1"
):
    """The checkpoint; `widths` of its layers."""

    out: str
    parameters: int
    widths: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/generate_dense.py", GenerateConfig, __doc__, EXAMPLES, interrupted=LEFT)
    return command.run(argv, generate)


def generate(config: GenerateConfig) -> GenerateResult:
    """Write the checkpoint.

    Raises:
        CheckpointError: another model's config, a width that it has no place for, or a folder that is not empty.
    """
    described = read_config(config.config)
    if not is_dense(described) or is_drafter(described):
        expected = "expected the config of a dense Laguna"
        raise CheckpointError(f"{config.config}: {expected}, got another; see tests/toy/dense")
    check_out(config.out)
    if not is_free(config.out):
        raise CheckpointError(f"{config.out}: expected an empty folder or none, got other files; choose another --out")
    widths = choose_widths(described, config.width)
    parameters = []

    def save(folder: Path) -> None:
        parameters.append(write_shards(config.config, described, widths, folder, config.seed))

    save_checkpoint(config.out, save)
    return GenerateResult(out=str(config.out), parameters=parameters[0], widths=tuple(widths))


def build_shards(config: ConfigJson, widths: list[int], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Build the tensors of a stock checkpoint in bf16: embedding, layers a few at a time, last norm and head."""
    H, D, stored = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    layers, kv = config["num_hidden_layers"], config["num_key_value_heads"]
    heads = list_heads(config)
    gates = [count * (1 if config.get("gating", True) in (True, "per-head") else D) for count in heads]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=STD, generator=generator)

    yield {"model.embed_tokens.weight": draw(config["vocab_size"], H)}
    for first in range(0, layers, LAYERS_PER_SHARD):
        shard: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, layers)):
            prefix, width = f"model.layers.{layer}", widths[layer]
            parts = {"self_attn.q_proj": draw(heads[layer] * D, H), "self_attn.o_proj": draw(H, heads[layer] * D)}
            parts |= {f"self_attn.{name}_proj": draw(kv * D, H) for name in ("k", "v")}
            if config.get("gating", True):
                parts["self_attn.g_proj"] = draw(gates[layer], H)
            parts |= {f"self_attn.{name}_norm": torch.ones(D, dtype=torch.bfloat16) for name in ("q", "k")}
            parts |= {f"{name}_layernorm": torch.ones(H, dtype=torch.bfloat16) for name in ("input", "post_attention")}
            for name in ("gate", "up"):
                parts[f"mlp.{name}_proj"] = torch.cat([draw(width, H), torch.zeros(stored - width, H).bfloat16()])
            parts["mlp.down_proj"] = torch.cat([draw(H, width), torch.zeros(H, stored - width).bfloat16()], dim=1)
            shard |= {f"{prefix}.{name}.weight": tensor for name, tensor in parts.items()}
        yield shard
    last = {"model.norm.weight": torch.ones(H, dtype=torch.bfloat16)}
    if not config.get("tie_word_embeddings"):
        last["lm_head.weight"] = draw(config["vocab_size"], H)
    yield last


def choose_widths(config: ConfigJson, asked: Sequence[tuple[range, int]]) -> list[int]:
    """Choose the width of every layer. Raises CheckpointError for one that the config has no place for."""
    stored, layers = config["intermediate_size"], config["num_hidden_layers"]
    widths = [stored] * layers
    for place, width in asked:
        if place.stop > layers or len(place) == 0 or width > stored:
            expected = f"layers 0 to {layers - 1} and at most {stored}"
            raise CheckpointError(
                f"--width: expected {expected}, got {place.start}-{place.stop - 1}={width}; correct it"
            )
        for layer in place:
            widths[layer] = width
    return widths


def write_shards(source: Path, config: ConfigJson, widths: list[int], out: Path, seed: int) -> int:
    """Write the checkpoint's files. Returns the number of parameters."""
    weight_map: dict[str, str] = {}
    total = 0
    count = -(-config["num_hidden_layers"] // LAYERS_PER_SHARD) + 2
    for number, shard in enumerate(build_shards(config, widths, seed), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        check_space(out, sum(tensor.nbytes for tensor in shard.values()))
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.numel() for tensor in shard.values())
        print(f"generate_dense: {name}: {total:,} parameters so far", file=sys.stderr, flush=True)
    for path in sorted(source.glob("tokenizer*.json")) + sorted(source.glob("*.jinja")):
        shutil.copyfile(path, out / path.name)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    for name, content in ((INDEX, index), ("config.json", config)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    return total


if __name__ == "__main__":
    sys.exit(main())
