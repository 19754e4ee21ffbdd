"""Make a smaller LLaDA: without the block of layers that is least missed, and without the least active units.

Every contiguous block of --remove-layers layers is left out in turn, and the agreement of the likeliest tokens with the
whole model's printed; the least missed one goes. Of each layer that stays the share --keep-units of the feed-forward
units is kept, those with the largest mean |silu(gate) · up|. The checkpoint is read twice, a layer at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig, Tensors, read_config
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.checkpoints.output import check_own, save_checkpoint, write_tensors
from laguna_serve.scripts.text.rows import read_rows
from laguna_serve.scripts.training.diffusion.ablation import RATIOS, Ablation, ablate, iterate_blocks
from laguna_serve.scripts.training.diffusion.saving import copy_tokenizer, write_config
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import check_out
from laguna_serve.serving.kit.tables import Table

EXAMPLES = """examples:
  python scripts/training/diffusion/prune.py tests/toy/llada --remove-layers 2 --keep-units 0.75 --out out/pruned
  python scripts/training/diffusion/prune.py LLADA-8B --remove-layers 8 --keep-units 0.75 --text code.jsonl --out DIR

exit status: 0 done, 2 it could not run, 130 interrupted
"""
UNITS = {"ff_proj": 0, "up_proj": 0, "ff_out": 1}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """A model, and what of it goes.

    Attributes:
        text: as in scripts/text/rows.py.
        tokens: of text, on which blocks and units are compared.
    """

    model: Annotated[Path, Flag("LLaDA checkpoint: a folder", positional=True)]
    out: Annotated[Path, Flag("folder for the smaller model")]
    remove_layers: Annotated[int, Flag("how many layers that follow each other go", at_least=1)] = 8
    keep_units: Annotated[float, Flag("the share of feed-forward units that stays", metavar="SHARE")] = 0.75
    text: Annotated[str, Flag(".txt, .jsonl with text or prompt, toy:training or toy:held-out")] = "toy:training"
    tokens: Annotated[int, Flag("tokens of text", at_least=1)] = 8192
    length: Annotated[int, Flag("tokens a row", at_least=2)] = 256
    dtype: Annotated[str, Flag("what the layers compute in: float32 or bfloat16")] = "float32"
    seed: Annotated[int, Flag("of the masks", at_least=0, at_most=MOST_SEED)] = 0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not 0 < self.keep_units <= 1:
            raise FlagError(f"--keep-units: expected a share above 0 and up to 1, got {self.keep_units}")
        if self.dtype not in ("float32", "bfloat16"):
            raise FlagError(f"--dtype: expected float32 or bfloat16, got {self.dtype}")


class BlockAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """A block of layers left out, and how often the likeliest tokens stay the same, by the ratio of masks."""

    layers: tuple[int, int]
    agreement: dict[str, float]


class PruneResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.llada_pruning/1"):
    """What went, what stayed and what every block was worth.

    Attributes:
        removed: first and last layer that went.
    """

    model: str
    out: str
    removed: tuple[int, int]
    units: tuple[int, int]
    parameters: tuple[int, int]
    rows: int
    blocks: tuple[BlockAgreement, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/training/diffusion/prune.py",
        PruneConfig,
        __doc__,
        EXAMPLES,
        others=(DiffusionError, PruningError),
        interrupted="it starts anew",
    )
    return command.run(argv, prune, show=_show)


def prune(config: PruneConfig) -> PruneResult:
    """Measure, choose, and write the smaller checkpoint.

    Raises:
        DiffusionError: the checkpoint cannot be used, or has no more layers than are to go.
        PruningError: the text cannot be used.
        CheckpointError: --out is a checkpoint already, or cannot be written; what was there before stays.
    """
    from transformers import PreTrainedTokenizerFast

    check_out(config.out)
    check_own(config.out, [config.model], own=False)
    shape = read_config(config.model)
    if config.remove_layers >= shape.n_layers:
        raise DiffusionError(f"--remove-layers: expected fewer than {shape.n_layers}, got {config.remove_layers}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model)
    rows = read_rows(config.text, tokenizer, config.length, config.tokens).rows
    dtype = getattr(torch, config.dtype)
    with Tensors(config.model) as tensors:
        found = ablate(tensors, shape, rows, config.remove_layers, dtype, config.seed, Progress())
        first = found.find_expendable()
        kept = [number for number in range(shape.n_layers) if not first <= number < first + config.remove_layers]
        width = max(1, round(shape.mlp_hidden_size * config.keep_units))
        smaller = replace(shape, n_layers=len(kept), mlp_hidden_size=width)
        parameters: list[int] = []

        def save(partial: Path) -> None:
            parameters.extend(_write(partial, tensors, shape, smaller, kept, found))
            write_config(partial, smaller)
            copy_tokenizer(config.model, partial)

        save_checkpoint(config.out, save)
    blocks = tuple(
        BlockAgreement(
            layers=(start, start + config.remove_layers - 1),
            agreement={f"{ratio}": round(share, 4) for ratio, share in agreement.items()},
        )
        for start, agreement in found.agreement.items()
    )
    return PruneResult(
        model=str(config.model),
        out=str(config.out),
        removed=(first, first + config.remove_layers - 1),
        units=(shape.mlp_hidden_size, width),
        parameters=(parameters[0], parameters[1]),
        rows=len(rows),
        blocks=blocks,
    )


def _write(
    out: Path, tensors: Tensors, shape: LladaConfig, smaller: LladaConfig, kept: list[int], found: Ablation
) -> tuple[int, int]:
    """Write a shard per layer and one for the rest, then the index; the parameters before and after."""
    with torch.device("meta"):
        ends = Llada(replace(shape, n_layers=0)).state_dict()
    rest = {name: tensors.read(name, tuple(empty.shape), torch.bfloat16) for name, empty in ends.items()}
    where = _save(out / _name_shard(0, kept), rest)
    before = after = sum(tensor.numel() for tensor in rest.values())
    for number, block in enumerate(iterate_blocks(tensors, shape, torch.bfloat16)):
        before += sum(tensor.numel() for tensor in block.state_dict().values())
        if number not in kept:
            continue
        place = kept.index(number)
        units = found.activations[number].argsort(descending=True, stable=True)[: smaller.mlp_hidden_size].sort().values
        prefix = f"model.transformer.blocks.{place}."
        state = {prefix + name: _cut(name, tensor, units) for name, tensor in block.state_dict().items()}
        after += sum(tensor.numel() for tensor in state.values())
        where |= _save(out / _name_shard(place + 1, kept), state)
    write_text(out / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": where}, indent=1) + "\n")
    return before, after


def _name_shard(number: int, kept: list[int]) -> str:
    return f"model-{number + 1:05d}-of-{len(kept) + 1:05d}.safetensors"


def _save(path: Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a shard; which of its tensors is where."""
    write_tensors(path, state)
    return dict.fromkeys(state, path.name)


def _cut(name: str, tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Keep a feed-forward tensor's rows or columns of these units."""
    part = name.partition(".")[0]
    return tensor.index_select(UNITS[part], units) if part in UNITS else tensor


def _show(result: PruneResult) -> str:
    heads = ["left out", *(f"agreement at {ratio}" for ratio in RATIOS)]
    rows = [
        [f"{block.layers[0]}-{block.layers[1]}", *(f"{block.agreement[f'{ratio}']:.3f}" for ratio in RATIOS)]
        for block in result.blocks
    ]
    gone = f"layers {result.removed[0]} to {result.removed[1]} and {result.units[0] - result.units[1]} units a layer"
    table = Table("lrrr", heads, rows).to_text()
    return f"{table}\n\nwithout {gone}: {result.parameters[0]:,} parameters became {result.parameters[1]:,}"


if __name__ == "__main__":
    sys.exit(main())
