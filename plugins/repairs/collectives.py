"""Data parallelism of a mixture on a CPU: collectives of unlike many rows, which every layer of experts needs.

A mixture's ranks gather all ranks' rows in front of the experts and share their sums out behind them. vLLM's
communicator of a CPU chooses that way and then lacks its two operations (vllm#57837): the first request ends the
engine. Gloo gathers what is of one shape only, so that shorter parts travel filled up.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_repairs.py::test_stock_cannot_gather_unlike_many_rows` fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(
    self: CpuCommunicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Gather all ranks' rows, in the order of ranks; of several tensors each.

    input_: [rows, …], of which each rank has as many as `sizes` says (by default all alike); dim: 0.
    """
    if not isinstance(input_, torch.Tensor):
        return [_gather(self, part, dim, sizes) for part in input_]
    return _gather(self, input_, dim, sizes)


def _gather(self: CpuCommunicator, rows: torch.Tensor, dim: int, sizes: list[int] | None) -> torch.Tensor:
    if dim != 0:
        raise NotImplementedError(f"expected dim 0, got {dim}")
    sizes = sizes or [rows.shape[0]] * self.world_size
    filled = rows.new_zeros(max(sizes), *rows.shape[1:])
    filled[: rows.shape[0]] = rows
    parts = [torch.empty_like(filled) for _ in sizes]
    distributed.all_gather(parts, filled, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Sum up all ranks' tensors, of which this rank gets its rows.

    input_: [rows of all ranks, …], of which each rank gets as many as `sizes` says (by default all alike); dim: 0.
    """
    if dim % input_.dim() != 0:
        raise NotImplementedError(f"expected dim 0, got {dim}")
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=self.device_group)
    own: torch.Tensor = total.split(sizes)[self.rank_in_group]
    return own


def apply() -> None:
    """Give the communicator what it lacks."""
    communicator: Any = CpuCommunicator
    communicator.all_gatherv = all_gatherv
    communicator.reduce_scatterv = reduce_scatterv
