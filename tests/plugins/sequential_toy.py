"""The toy's drafter with a sequential head of random weights, large enough to change what is drafted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

TOY = Path(__file__).resolve().parent.parent / "toy"
RANK = 8


def make_sequential(folder: Path, seed: int = 0, out_std: float = 0.7) -> Path:
    """Write the drafter, with the toy's tokenizer; `out_std`: how much the head changes."""
    from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter

    toy = LagunaDrafter.load(TOY / "dflash")
    torch.manual_seed(seed)
    drafter = LagunaDrafter(replace(toy.shape, head_rank=RANK))
    drafter.load_state_dict(toy.state_dict(), strict=False)
    assert drafter.sequential_head is not None
    for parameter in drafter.sequential_head.parameters():
        parameter.data.normal_(std=0.7)
    drafter.sequential_head.out.weight.data.normal_(std=out_std)
    drafter.save(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TOY / "dflash" / file).read_bytes())
    return folder
