"""The processes that train together, as `torchrun` starts them; one alone where it did not."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions' default is the group that is open when it is imported, which would never end: before any is opened.
import torch.distributed.nn.functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# While one of them writes or computes for all, the others wait.
PATIENCE = timedelta(days=7)
_meshes: list[DeviceMesh] = []


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Say whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's share of `count` things: contiguous, and as even as it goes."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def add(self, values: dict[str, float]) -> dict[str, float]:
        """Sum every process's values; all have the same keys."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def add_gradients(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """Sum every process's gradients in place; a weight that had no part in the loss counts as 0."""
        if self.size == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)


ALONE = Ranks()


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started (WORLD_SIZE, RANK): nccl on CUDA devices, gloo elsewhere.

    gloo's threads end with the group, and the group with its last reference: nothing that was shared out among the
    processes may outlive the block. A thread that still holds a tensor when the interpreter ends aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Sums of figures and waiting need no device: gloo carries them beside nccl.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # models are cycles, and hold the group
        while _meshes:  # DTensor's caches keep meshes for good; checked against torch 2.13
            _meshes.pop()._pg_registry.clear()
        dist.destroy_process_group()


def make_mesh(device: torch.device) -> DeviceMesh:
    """Lay all processes out in a row, each with a device of this type; not to be used after `open_ranks` ends."""
    _meshes.append(init_device_mesh(device.type, (dist.get_world_size(),)))
    return _meshes[-1]
