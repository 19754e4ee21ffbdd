"""What a drafter's config.json says of its sequential head (models/dflash_head.py), and which tensors that takes.

Plain Python, for the plugins, the launcher and the tools alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In config.json's dflash_config: {"rank": r}. Also what its tensors' names begin with.
HEAD = "sequential_head"


class HeadError(ValueError):
    """A head that cannot be: one line, without its subject."""


def read_rank(dflash_config: Mapping[str, Any]) -> int | None:
    """Read a head's rank from a drafter's `dflash_config`; None for a drafter without one.

    Raises:
        HeadError: it says something else.
    """
    head = dflash_config.get(HEAD)
    if head is None:
        return None
    rank = head.get("rank") if isinstance(head, Mapping) else None
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or set(head) != {"rank"}:
        raise HeadError(f'expected dflash_config.{HEAD} to be {{"rank": an integer from 1 on}}, got {head!r}')
    return rank


def describe_rank(rank: int | None) -> dict[str, Any]:
    """Describe a head as `dflash_config` has it; nothing for none."""
    return {} if rank is None else {HEAD: {"rank": rank}}


def head_shapes(vocab_size: int, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of a head's tensors in a checkpoint."""
    shapes = {
        "tokens.weight": (vocab_size, rank),
        "places.weight": (2 * rank, hidden_size),
        "places.bias": (2 * rank,),
        "mix.weight": (2 * rank, 2 * rank),
        "out.weight": (vocab_size, rank),
    }
    return {f"{HEAD}.{name}": shape for name, shape in shapes.items()}
