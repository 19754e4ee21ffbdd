"""A table of blocks is looked at once, on the host: a look in every call would cost more than the call."""

from __future__ import annotations

import itertools

import torch
from torch.utils.weak import WeakIdKeyDictionary

# block_start → the number of blocks, the bound and the version of it that were found to go together.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_block_start(start: torch.Tensor, n: int, most: int) -> None:
    """Check start [E + 1] against n blocks in all and `most` of an expert, once per tensor and change in place.

    Within a CUDA graph's capture nothing can be read: the kernels hold every entry to these limits as well.

    Raises:
        IndexError: an entry is out of range, or an expert has more blocks than the bound.
    """
    if _checked.get(start) == (n, most, start._version):
        return
    if start.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    entries = start.tolist()
    widths = [end - begin for begin, end in itertools.pairwise(entries)]
    if entries[0] < 0 or entries[-1] > n or min(widths) < 0:
        got = str(entries) if len(entries) <= 12 else f"{entries[:6]} … {entries[-3:]}"
        raise IndexError(f"block_start: expected ascending numbers up to {n}, got {got}; check the checkpoint")
    if max(widths) > most:
        limit = f"at most {most} blocks for an expert, as max_blocks_per_expert says"
        raise IndexError(f"block_start: expected {limit}, got {max(widths)}; pass the true bound")
    _checked[start] = (n, most, start._version)
