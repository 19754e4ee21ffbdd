"""Digests of the weights that an engine serves with: two engines that should have the same can be told apart if not.

vLLM's own checksums (`/weight_checker`) are of the target's parameters. What a drafter has is not among them, nor what
was packed aside: on a CPU a linear layer's parameter is empty once oneDNN has its weights, so that all engines agree.
Here everything that takes part in the arithmetic does: parameters, buffers, the fused and packed tensors that hang on
modules, and oneDNN's packed matrices, which are read through their products with rows of the identity.

Given to vLLM with `--worker-extension-cls`, which `laguna serve --weight-updates` does; asked with vLLM's
`/collective_rpc {"method": "digest_weights"}`, one answer per rank. Checked against vLLM 0.32.0, read against 0.26.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What hangs on attention layers and belongs to requests.
NOT_WEIGHTS = ("kv_cache",)
# Rows of the identity at a time.
ROWS = 256
THREADS = 8

Bytes = Callable[[], memoryview]


class Digests(TypedDict):
    """What a rank has: SHA-256 in hex of its part of the model, and of its drafter; None without one."""

    model: str
    draft: str | None


class WeightDigests:
    """vLLM adds it to its worker's bases."""

    model_runner: Any

    def digest_weights(self) -> Digests:
        """Digest what this rank serves with."""
        drafter = getattr(getattr(self.model_runner, "drafter", None), "model", None)
        draft = digest(drafter) if isinstance(drafter, nn.Module) else None
        return Digests(model=digest(self.model_runner.get_model()), draft=draft)


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """SHA-256 in hex of every tensor of a model, its name, dtype and shape among them."""
    found = hashlib.sha256()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for each in pool.map(lambda item: f"{item[0]} {hashlib.sha256(item[1]()).hexdigest()}\n", _list_parts(model)):
            found.update(each.encode())
    return found.hexdigest()


def _list_parts(model: nn.Module) -> Iterator[tuple[str, Bytes]]:
    for prefix, module in model.named_modules():
        for name, value in sorted(_list_values(module).items()):
            yield from _list_tensors(f"{prefix}.{name}", value)
        if (product := getattr(module, "cpu_linear", None)) is not None:
            for number, cell in enumerate(getattr(product, "__closure__", None) or ()):
                name = f"{prefix}.cpu_linear.{number}"
                if isinstance(cell.cell_contents, torch.Tensor):
                    yield from _list_tensors(name, cell.cell_contents)
                elif hasattr(cell.cell_contents, "handler_tensor"):
                    yield name, lambda handler=cell.cell_contents, of=module: _unpack(handler, of.weight.dtype)  # type: ignore[misc]


def _list_values(module: nn.Module) -> dict[str, torch.Tensor]:
    held = {**vars(module), **module._parameters, **module._buffers}
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor) and name not in NOT_WEIGHTS}


def _list_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Bytes]]:
    """List a tensor, or those inside of it, as torchao's have them."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _list_tensors(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield f"{name} {tensor.dtype} {list(tensor.shape)}", lambda: _read(tensor)


def _read(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _unpack(handler: Any, dtype: torch.dtype) -> memoryview:
    """Multiply what oneDNN has packed by the identity: sums of one weight and zeros, so exact."""
    from vllm._custom_ops import onednn_mm

    identity = torch.eye(handler.k, dtype=dtype)
    return _read(torch.cat([onednn_mm(handler, rows.contiguous(), None) for rows in identity.split(ROWS)]))
