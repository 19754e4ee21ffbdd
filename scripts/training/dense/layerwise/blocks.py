"""Stage 1 a layer at a time, layers in parallel over processes.

A block learns its sparse block's output and nothing of the other layers, so that its training needs one decoder layer
and the hidden states in front of it. With N processes N sparse layers are trained at once, one by each; who trains a
layer decides nothing about the outcome, so that two processes make the blocks that one makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.laguna.modeling_laguna import LagunaMLP

from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.initial import Usage, start_block
from laguna_serve.scripts.training.dense.layerwise.hidden import HiddenStates
from laguna_serve.scripts.training.dense.losses import normalised_error
from laguna_serve.scripts.training.dense.stages import USAGE_BATCHES, Blocks, schedule_of
from laguna_serve.scripts.training.dense.text import Text
from laguna_serve.scripts.training.loop import Loss, train
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.ranks import Ranks
from laguna_serve.serving.kit.files import write_file, write_text


def train_layerwise(
    layers: Layers, widths: list[int], text: Text, recipe: Recipe, work: Path, threads: int, ranks: Ranks
) -> tuple[nn.ModuleDict, list[dict[str, float]]]:
    """Stage 1 from the shards: the blocks, and the log as of `train_blocks`.

    On disk: hidden states of all batches in front of as many layers as there are processes, and one more.

    Raises:
        DiskError: there is no room for them. CheckpointError: a tensor is missing, or of another shape.
    """
    sparse = [number for number, kind in enumerate(layers.config.mlp_layer_types) if kind == "sparse"]
    distinct = min(recipe.stage1_steps, recipe.stage1_batches or recipe.stage1_steps)

    def ids_of(number: int) -> torch.Tensor:
        name = f"usage/{number}" if number < USAGE_BATCHES else recipe.batch_of(1, number - USAGE_BATCHES)
        return text.batch(name, recipe.rows, recipe.length)

    hidden = HiddenStates(work / "hidden", layers, USAGE_BATCHES + distinct, recipe.rows, recipe.length, ids_of, ranks)
    hidden.require_room(ranks.size + 1)
    for first in range(0, len(sparse), ranks.size):
        wave = sparse[first : first + ranks.size]
        if not all(_block_path(work, number).exists() for number in wave):
            hidden.advance(wave[-1])
            hidden.drop_before(wave[0])
            if ranks.rank < len(wave):
                _train_layer(hidden, wave[ranks.rank], widths[wave[ranks.rank]], recipe, work, threads)
        ranks.wait()
    ranks.wait()
    if ranks.first:
        for path in hidden.folder.glob("*"):
            path.unlink()
    blocks = nn.ModuleDict({str(number): _load_block(layers.config, work, number) for number in sparse})
    return blocks.to(layers.device), merge_logs({number: _read_log(work, number) for number in sparse})


def merge_logs(logs: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Put the logs of layers together as if they had been trained at once."""
    merged = []
    for records in zip(*logs.values(), strict=True):
        figures = {f"layer {number}": record["loss"] for number, record in zip(logs, records, strict=True)}
        total = sum(figures.values())
        merged.append({"step": records[0]["step"], "loss": total, **figures, "mean": total / len(figures)})
    return merged


def _train_layer(hidden: HiddenStates, number: int, width: int, recipe: Recipe, work: Path, threads: int) -> None:
    """Train one layer's block and write it, unless it is there."""
    if _block_path(work, number).exists():
        return
    layers = hidden.layers
    layer, states = layers.load(number), hidden.open(number)
    usage = Usage.of(layers.config.num_experts)
    handle = usage.watch(layer.mlp.gate)
    with torch.no_grad():
        for batch in range(USAGE_BATCHES):
            hidden.run(number, layer, states[batch])
    handle.remove()
    block = start_block(layers.config, layer.mlp, width, usage, recipe.init, number).to(layers.device)
    reader = Blocks({number: layer.mlp})
    distinct = len(states) - USAGE_BATCHES

    def loss_of_step(step: int) -> Loss:
        with torch.no_grad():
            hidden.run(number, layer, states[USAGE_BATCHES + step % distinct])
        inputs, wanted = reader.seen[number]
        return normalised_error(block(inputs), wanted), {}

    state_file = work / f"layer-{number:03d}.state"
    log = train(
        f"stage 1, layer {number}",
        block,
        schedule_of(recipe, 1),
        loss_of_step,
        state_file,
        log_every=recipe.log_every,
        threads=threads,
    )
    write_text(_log_path(work, number), json.dumps(log))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in block.state_dict().items()}
    write_file(_block_path(work, number), lambda partial: save_file(tensors, partial))
    state_file.unlink()


def _load_block(config: Any, work: Path, number: int) -> LagunaMLP:
    tensors = load_file(_block_path(work, number))
    with torch.device("meta"):
        block = LagunaMLP(config, len(tensors["gate_proj.weight"]))
    block.load_state_dict(tensors, assign=True)
    return block.requires_grad_()


def _read_log(work: Path, number: int) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads(_log_path(work, number).read_text())
    return log


def _block_path(work: Path, number: int) -> Path:
    return work / f"layer-{number:03d}.safetensors"


def _log_path(work: Path, number: int) -> Path:
    return work / f"layer-{number:03d}.json"
