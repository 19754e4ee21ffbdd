"""The dense student of a Laguna mixture of experts: the teacher with every sparse block replaced by one SwiGLU.

A block's width is that of the teacher's active path, k routed experts and the shared one, so that a token costs as much
as before. Attention, norms, embedding and head are the teacher's; a dense layer stays as it is or is widened. The
checkpoint is stock Laguna, which knows one width for all layers: narrower ones are padded with zeros, which changes no
output as silu(0) · 0 = 0.

Source: the form of postscarcity-inc's Laguna-XS.2-dense, whose layers 1–39 of 4608 are stored as 8192.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LagunaConfig, LagunaForCausalLM, PreTrainedTokenizerBase
from transformers.models.laguna.modeling_laguna import LagunaMLP

from laguna_serve.scripts.training.pruning.streaming.layers import read_laguna
from laguna_serve.serving.checkpoint import read_config
from laguna_serve.serving.checkpoint.quantisation import find_rotation
from laguna_serve.serving.kit.errors import CommandError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
INIT_STD = 0.02
GENERATION = "generation_config.json"


class WidthError(CommandError, ValueError):
    """A width that the student cannot have, as one line."""


def choose_widths(config: LagunaConfig, overrides: dict[int, int]) -> list[int]:
    """Choose the width of every layer: the active path's where the teacher is sparse, its own where it is dense.

    Raises:
        WidthError: an override of a layer that is not there, below 1, or below a dense layer's own width.
    """
    active = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    sparse = [kind == "sparse" for kind in config.mlp_layer_types]
    if not any(sparse):
        raise WidthError("teacher: expected a mixture of experts, got dense layers alone; there is nothing to distil")
    widths = [active if is_sparse else config.intermediate_size for is_sparse in sparse]
    for layer, width in overrides.items():
        if not 0 <= layer < len(widths):
            raise WidthError(f"--width: expected a layer from 0 to {len(widths) - 1}, got {layer}; check it")
        least = 1 if sparse[layer] else config.intermediate_size
        if width < least:
            raise WidthError(f"--width: expected at least {least} for layer {layer}, got {width}; raise it")
        widths[layer] = width
    return widths


def student_config(config: LagunaConfig, widths: list[int]) -> LagunaConfig:
    """Return the teacher's config with dense layers alone, as wide as the widest."""
    described = copy.deepcopy(config)
    described.mlp_layer_types = ["dense"] * config.num_hidden_layers
    # What older releases of vLLM and transformers read instead.
    described.mlp_only_layers = list(range(config.num_hidden_layers))
    described.decoder_sparse_step = 1
    described.intermediate_size = max(widths)
    described.architectures = ["LagunaForCausalLM"]
    return described


@torch.no_grad()
def fill_block(block: LagunaMLP, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, seed: int = 0) -> None:
    """Set a block of width N from gate, up [M, H] and down [H, M].

    The first M units are theirs, further ones random with down columns of zero, so that they change nothing before they
    are trained.
    """
    random = torch.Generator().manual_seed(seed)  # the same in every process that makes this block
    width = min(block.intermediate_size, gate.shape[0])
    for name, tensor in zip(PROJECTIONS, (gate[:width], up[:width], down[:, :width]), strict=True):
        weight = getattr(block, name).weight
        if name == "down_proj":
            weight.zero_()
            weight[:, :width] = tensor
        else:
            weight.normal_(std=INIT_STD, generator=random)
            weight[:width] = tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """What the student has of the teacher besides blocks, from a model or from shards, one layer at a time.

    Attributes:
        layer: number → the teacher's decoder layer.
        outer: embedding, last norm and head, by their names in the state.
    """

    config: LagunaConfig
    layer: Callable[[int], Any]
    outer: dict[str, torch.Tensor]


OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def frame_model(teacher: LagunaForCausalLM) -> Frame:
    """Take the frame from a whole teacher."""
    state = teacher.state_dict()
    return Frame(teacher.config, lambda number: teacher.model.layers[number], {name: state[name] for name in OUTER})


@torch.no_grad()
def assemble_student(frame: Frame, blocks: nn.ModuleDict, widths: list[int], device: torch.device) -> LagunaForCausalLM:
    """Assemble the student at its true widths, fp32: what is the teacher's is copied, the blocks are taken over."""
    student = LagunaForCausalLM(student_config(frame.config, [1]))
    for number, width in enumerate(widths):
        original, layer = frame.layer(number), student.model.layers[number]
        if str(number) in blocks:
            layer.mlp = blocks[str(number)]
        else:
            layer.mlp = LagunaMLP(frame.config, width)
            gate, up, down = (getattr(original.mlp, name).weight.float() for name in PROJECTIONS)
            fill_block(layer.mlp, gate, up, down, number)
        kept = {name: t.float() for name, t in original.state_dict().items() if not name.startswith("mlp.")}
        missing, unexpected = layer.load_state_dict(kept, strict=False)
        assert not unexpected
        assert all(name.startswith("mlp.") for name in missing)
    student.load_state_dict({name: tensor.float() for name, tensor in frame.outer.items()}, strict=False)
    return student.to(device)


def save_padded(
    student: LagunaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    widths: list[int],
    dtype: torch.dtype,
    teacher: Path,
    folder: Path,
) -> None:
    """Write a checkpoint in stock layout, narrower layers padded with zeros at the end, and its tokenizer.

    It is asked as the teacher in that folder is: with its generation_config.json.
    """
    stored = max(widths)
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in student.state_dict().items()}
    for layer, width in enumerate(widths):
        for name in PROJECTIONS:
            key = f"model.layers.{layer}.mlp.{name}.weight"
            missing = (0, stored - width) if name == "down_proj" else (0, 0, 0, stored - width)
            tensors[key] = nn.functional.pad(tensors[key], missing).contiguous()
    with torch.device("meta"):
        shell = LagunaForCausalLM(student_config(student.config, widths))
    shell.config.dtype = dtype
    shell.save_pretrained(folder, state_dict=tensors)
    config = folder / "config.json"
    described = json.loads(config.read_text())
    described["dtype"] = str(dtype).removeprefix("torch.")
    described.pop("auto_map", None)  # code of its own stays with the teacher: transformers and vLLM have the class
    if (rotation := find_rotation(read_config(teacher))) is not None:
        described["transform_config"] = rotation
    config.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    if (generation := teacher / GENERATION).is_file():
        shutil.copyfile(generation, folder / GENERATION)


def count_teacher(folder: Path) -> int:
    """Count the teacher's parameters from its config.json."""
    with torch.device("meta"):
        shell = LagunaForCausalLM(read_laguna(folder))
    return sum(parameter.numel() for parameter in shell.parameters())
