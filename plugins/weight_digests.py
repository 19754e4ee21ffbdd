"""Digests of the weights that an engine serves with: two engines that should have the same can be told apart if not.

vLLM's own checksums (`/weight_checker`) are of the target's parameters. What a drafter has is not among them, nor what
was packed aside: on a CPU a linear layer's parameter is empty once oneDNN has its weights, so that all engines agree.
Here everything that takes part in the arithmetic does: parameters, buffers, the fused and packed tensors that hang on
modules, and oneDNN's packed matrices, which are read through their products with rows of the identity.

Given to vLLM with `--worker-extension-cls`, which `laguna serve --weight-updates` does; asked with vLLM's
`/collective_rpc {"method": "digest_weights"}`, one answer per rank (of data parallel engines the first one's alone).
Checked against vLLM 0.32.0.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What hangs on attention layers and belongs to requests.
NOT_WEIGHTS = ("kv_cache",)
# What is copied from a device, or unpacked, at a time.
SLICE_BYTES = 64 << 20
ROWS = 256
THREADS = 8


class Digests(TypedDict):
    """What a rank has: SHA-256 in hex of its part of the model, and of its drafter; None without one."""

    model: str
    draft: str | None


class WeightDigests:
    """vLLM adds it to its worker's bases."""

    model_runner: Any

    def can_digest_weights(self) -> dict[str, bool]:
        """Say so: an engine without this class refuses the question."""
        return {"can": True}

    def digest_weights(self) -> Digests:
        """Digest what this rank serves with."""
        drafter = self.model_runner.get_draft_model()
        return Digests(
            model=digest(self.model_runner.get_model()), draft=digest(drafter) if drafter is not None else None
        )


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """SHA-256 in hex of every tensor of a model, its name, dtype and shape among them."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # threads have streams of their own
    tensors, packed = _list_tensors(model), _list_packed(model)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        lines = [*pool.map(lambda item: f"{item[0]} {_hash(_slice(item[1]))}\n", tensors)]
    # oneDNN's products share one scratch pad: one after the other, in the thread that the model's own run in.
    lines += [f"{name} {dtype} {_hash(_unpack(handler, dtype))}\n" for name, handler, dtype in packed]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash(parts: Iterable[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _slice(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.detach().contiguous().view(-1)
    for part in flat.split(max(1, SLICE_BYTES // max(1, flat.element_size()))):
        yield part.cpu()


def _list_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, value in sorted(_list_values(module).items()):
            yield from _open(f"{prefix}.{name}", value)
        for number, held in enumerate(_list_cells(module)):
            if isinstance(held, torch.Tensor):
                yield from _open(f"{prefix}.cpu_linear.{number}", held)


def _list_packed(model: nn.Module) -> Iterator[tuple[str, Any, torch.dtype]]:
    """List oneDNN's handlers, which hold matrices, and these matrices' dtypes."""
    for prefix, module in model.named_modules():
        for number, held in enumerate(_list_cells(module)):
            if hasattr(held, "handler_tensor"):
                yield f"{prefix}.cpu_linear.{number}", held, module.weight.dtype


def _list_cells(module: nn.Module) -> list[Any]:
    """List what a linear layer's product on a CPU, a closure of vLLM's, has in it."""
    cells = getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]


def _list_values(module: nn.Module) -> dict[str, torch.Tensor]:
    held = {**vars(module), **module._parameters, **module._buffers}
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor) and name not in NOT_WEIGHTS}


def _open(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Open a tensor that consists of others, as torchao's do; a name says dtype and shape, too."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _open(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield f"{name} {tensor.dtype} {list(tensor.shape)}", tensor


def _unpack(handler: Any, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Multiply what oneDNN has packed by rows of the identity: sums of one weight and zeros, so exact."""
    from vllm._custom_ops import onednn_mm

    for first in range(0, handler.k, ROWS):
        rows = torch.zeros(min(ROWS, handler.k - first), handler.k, dtype=dtype)
        rows.diagonal(first).fill_(1)
        yield onednn_mm(handler, rows, None)
