"""New weights for a loaded model, in place and all or nothing.

vLLM's own way of loading weights again (model_loader/reload/layerwise.py) goes layer by layer into the model that
serves, so a file that breaks off leaves half of each version; and on a CPU it forgets what was packed aside from the
parameters (oneDNN's handles, a DFlash drafter's fused matrices). Here a model gets a second set of parameters beside
those it serves with; everything that can fail happens there: reading, loading, packing, comparing of shapes. Only then
are the values copied into the tensors that the compiled graphs know, which cannot fail. It takes a second copy of the
weights for as long as it runs.

Every element of the second set starts as NaN: what no tensor was loaded into, or a tensor that is not finite, is seen.

vLLM's records of the parameters' shapes before packing are internal (`LayerReloadingInfo.restore_metadata`). Checked
against vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

# Parameters that a checkpoint need not have, and that nothing uses then.
OPTIONAL = ("mask_embedding",)

Pair = tuple[torch.Tensor, torch.Tensor]  # what the model serves with, and its new values


class StagingError(ValueError):
    """Weights that the model cannot take; it goes on with those that it has."""


@dataclass(slots=True)
class _Served:
    """What one module serves with: put back after the staging, whatever came of it."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    tensors: dict[str, torch.Tensor]
    gemm: Callable[..., torch.Tensor] | None

    @classmethod
    def of(cls, module: nn.Module) -> _Served:
        tensors = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        return cls(
            module, dict(module._parameters), dict(module._buffers), tensors, getattr(module, "cpu_linear", None)
        )

    def put_back(self) -> None:
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)
        for name, tensor in self.tensors.items():
            setattr(self.module, name, tensor)
        if self.gemm is not None:
            self.module.cpu_linear = self.gemm  # type: ignore[assignment]

    def pair(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """(name, what is served with, what was staged) of every tensor that the module holds in any way."""
        for name, parameter in self.parameters.items():
            if parameter is not None:
                yield name, parameter, self.module._parameters[name]
        for name, buffer in self.buffers.items():
            if buffer is not None:
                yield name, buffer, self.module._buffers[name]
        for name, tensor in self.tensors.items():
            yield name, tensor, getattr(self.module, name)


@torch.no_grad()
def load_in_place(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, kept: Collection[nn.Module] = ()
) -> None:
    """Give a model new weights, in the names and shapes of its checkpoint.

    Args:
        model: loaded by vLLM, unquantised but for experts in FP8 (SentinelExperts).
        weights: (name, tensor) as a checkpoint has them; they are read as they are needed.
        kept: modules that are left alone, such as those that a drafter shares with its target.

    Raises:
        StagingError: tensors are missing or not finite, or do not fit. The model is as it was.
        Whatever `weights` and the model's own loader raise. The model is as it was.
    """
    modules = [module for module in model.modules() if module not in set(kept)]
    served = [_Served.of(module) for module in modules]
    try:
        _stage(modules)
        model.load_weights(weights)  # type: ignore[operator]
        _check_loaded(model, modules)
        for module in modules:
            if isinstance(method := getattr(module, "quant_method", None), QuantizeMethodBase):
                method.process_weights_after_loading(module)
        pairs, gemms = _pair(served)
    finally:
        for held in served:
            held.put_back()
    for old, new in pairs:
        old.data.copy_(new.data)
    for old_gemm, new_gemm in gemms:
        _adopt(old_gemm, new_gemm)


def _stage(modules: Iterable[nn.Module]) -> None:
    """Parameters full of NaN in the shapes of the checkpoint, and copies of the buffers, into every module."""
    staged: dict[int, nn.Parameter] = {}  # by the served one's id: a parameter may stand in several modules
    for module in modules:
        recorded = get_layerwise_info(module).restore_metadata[0]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in staged:
                staged[id(parameter)] = _make_empty(module, recorded.get(name), parameter)
            module._parameters[name] = staged[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


def _make_empty(module: nn.Module, recorded: torch.Tensor | None, served: nn.Parameter) -> nn.Parameter:
    if recorded is None or not served.is_floating_point():
        fresh: Any = served.data.clone()
        fresh.__class__ = served.__class__
        fresh.__dict__.update(vars(served))
    else:
        with served.device:
            fresh = restore_layer_refs(materialize_meta_tensor(recorded), module)
    if fresh.is_floating_point():
        fresh.data.fill_(torch.nan)
    return fresh  # type: ignore[no-any-return]


def _check_loaded(model: nn.Module, modules: Collection[nn.Module]) -> None:
    for prefix, module in model.named_modules():
        if module not in modules:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or name in OPTIONAL or not parameter.is_floating_point():
                continue
            # torch 2.13 looks for NaN in FP8 in a wider dtype alone.
            values = parameter.half() if parameter.element_size() == 1 else parameter
            if not torch.isfinite(values).all():
                expected = f"finite values for all of {prefix}.{name} {list(parameter.shape)}"
                raise StagingError(f"weights: expected {expected}, got NaN or nothing; write them again")


def _pair(served: Iterable[_Served]) -> tuple[list[Pair], list[tuple[Any, Any]]]:
    pairs, gemms = [], []
    for held in served:
        for name, old, new in held.pair():
            if new is old or name in OPTIONAL:
                continue
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                got = None if new is None else f"{new.dtype} {list(new.shape)}"
                what = f"{type(held.module).__name__}.{name}"
                raise StagingError(f"{what}: expected {old.dtype} {list(old.shape)}, got {got}; restart the engine")
            pairs.append((old, new))
        gemm = getattr(held.module, "cpu_linear", None)
        if held.gemm is not None and gemm is not held.gemm:
            _check_adoptable(held.gemm, gemm)
            gemms.append((held.gemm, gemm))
    return pairs, gemms


# vLLM's matrix product on a CPU is a closure over the packed weights (layers/utils.py, dispatch_cpu_unquantized_gemm);
# compiled graphs have the tensors of the first one in them.


def _list_cells(gemm: Any) -> dict[str, Any]:
    cells = gemm.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(gemm.__code__.co_freevars, cells, strict=True)}


def _check_adoptable(old: Any, new: Any) -> None:
    if old.__code__ is not new.__code__:
        raise StagingError("weights: expected the matrix product that was compiled, got another; restart the engine")


def _adopt(old: Any, new: Any) -> None:
    """Make the compiled product work with the new one's packed weights; the old ones are freed with `new`."""
    theirs = _list_cells(new)
    for name, ours in _list_cells(old).items():
        if isinstance(ours, torch.Tensor):
            ours.copy_(theirs[name])
        elif isinstance(handle := getattr(ours, "handler_tensor", None), torch.Tensor):
            freed = handle.clone()
            handle.copy_(theirs[name].handler_tensor)
            theirs[name].handler_tensor.copy_(freed)
