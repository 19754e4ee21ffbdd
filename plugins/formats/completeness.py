"""Refuses, when it is loaded, a checkpoint that left a parameter of the model as it was allocated.

vLLM misses norms at most: it passes over every module with a quantisation method, which unquantised linear layers have
too, over quantised models as a whole, and takes a matrix that it merges of several (q, k and v, an expert's, all
experts') for loaded with the first of them. What is missing is then served as zeros, or as what lay in memory.

Only what vLLM's loader reads of a checkpoint for the first time is held against the model: transfers of new weights may
come in parts. Read in vLLM 0.32.0 (model_loader/default_loader.py, models/utils.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Weights = Iterable[tuple[str, torch.Tensor]]
Loads = Callable[[Any, Weights], Any]

# The generator with which vLLM's loader hands a whole checkpoint over.
WHOLE = "DefaultModelLoader.get_all_weights"
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
ROUTED = re.compile(r"(.*\.experts)\.(?:routed_experts\.)?(w13|w2)_(.+)")
# The module that holds the experts' matrices: vLLM before 0.32 leaves it out of the names that it says it has set.
HOLDER = ".routed_experts."
BIAS = "e_score_correction_bias"
# What no checkpoint need have: scales of activations and of the KV cache, a quantiser's notes, a drafter's own mask.
OPTIONAL = re.compile(
    r"(?:w13_|w2_)?(?:(?:[qkv]|prob)_scale|input_.*|weight_shape|(?:weight_)?(?:g_idx|g_idx_sort_indices|zero_point)"
    r"|qzeros|mask_embedding)"
)
# Parameters that a quantised matrix has by any method; what else it has, and by which names, is the method's affair.
QUANTISED = re.compile(r"(?:w13_|w2_)?(?:q?weight|weight_packed)")
# Parameters of which a module says itself what has not come (`missing_tensors`).
OWN = ("_blocks", "_scales")
NAMED = 3  # of the missing tensors


class IncompleteError(ValueError):
    """A checkpoint that lacks tensors, as one line."""


def refuse_incomplete(load: Loads, *, rename: Callable[[str], str] = str) -> Loads:
    """Wrap a model's `load_weights` so that it refuses a checkpoint that has not all of its tensors.

    A model's `shared_parameters`, where it has them, come from elsewhere if the checkpoint has none.

    Args:
        rename: a tensor's name in the checkpoint → the parameter's.
    """

    @functools.wraps(load)
    def load_all(model: Any, weights: Weights) -> Any:
        if model.__dict__.get("_is_complete") or getattr(weights, "__qualname__", "") != WHOLE:
            return load(model, weights)
        stored: dict[str, torch.dtype] = {}

        def note() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                stored[_shorten(rename(name))] = tensor.dtype
                yield name, tensor

        loaded = load(model, note())
        shared = getattr(model, "shared_parameters", ())
        missing = [name for name in list_missing(model, stored, loaded) if name not in shared]
        _refuse(model, missing or list_unscaled(stored))
        model._is_complete = True
        return loaded

    return load_all


def list_missing(model: nn.Module, stored: Collection[str], loaded: Collection[str] | None) -> list[str]:
    """List the tensors that a model lacks, in the order of its parameters.

    Args:
        stored: the checkpoint's tensors, as `_shorten` has their names.
        loaded: the parameters that were set, as the model says; None where it does not.
    """
    missing: list[str] = []
    modules = dict(model.named_modules())
    matrices = set(map(_name_matrix, stored))
    for full, parameter in model.named_parameters():
        prefix, _, name = full.rpartition(".")
        module = modules[prefix]
        quantised = _is_quantised(module)
        if parameter.numel() == 0 or _need_not_come(module, name) or (quantised and not QUANTISED.fullmatch(name)):
            continue
        parts = _list_parts(model, module, full, stored)
        lacking = [part for part in parts if _shorten(part) not in stored]
        if quantised:  # one tensor of a matrix stands for all
            lacking = [part for part in lacking if _name_matrix(_shorten(part)) not in matrices]
        if loaded is not None and (full in loaded or full.replace(HOLDER, ".") in loaded):
            missing += lacking if len(lacking) < len(parts) else []  # else it came merged already
        elif loaded is None or quantised:
            missing += lacking
        else:
            own = module.missing_tensors() if name.endswith(OWN) and hasattr(module, "missing_tensors") else []
            missing += [f"{prefix}.{tensor}" for tensor in own] or lacking or [full]
    return list(dict.fromkeys(missing))


def list_unscaled(stored: Mapping[str, torch.dtype]) -> list[str]:
    """List the scales that matrices in FP8 lack; their values are no weights without them.

    Args:
        stored: the checkpoint's tensors, by name.
    """
    scaled = {_name_matrix(name) for name in stored if "scale" in name.rpartition(".")[2]}
    fp8 = [name for name, dtype in stored.items() if dtype == torch.float8_e4m3fn and name.endswith(".weight")]
    return [f"{name}_scale" for name in fp8 if _name_matrix(name) not in scaled]


def _list_parts(model: Any, module: nn.Module, full: str, stored: Collection[str]) -> list[str]:
    """List the tensors of a checkpoint that make a parameter up."""
    if routed := ROUTED.fullmatch(full):
        prefix, matrix, rest = routed.groups()
        experts: Iterable[int] = range(model.config.num_experts)
        if getattr(module, "expert_map", None) is not None:  # other ranks' need not be read
            experts = sorted(_list_experts(_shorten(prefix), stored))
        return [f"{prefix}.{expert}.{part}.{rest}" for expert in experts for part in EXPERTS[matrix]]
    if full.endswith(BIAS):
        return [f"{full[: full.rindex('.mlp.')]}.mlp.experts.{BIAS}"]
    for merged, parts in MERGED.items():
        if f".{merged}." in full and _shorten(full) not in stored:
            return [full.replace(f".{merged}.", f".{part}.") for part in parts]
    return [full]


def _list_experts(prefix: str, stored: Collection[str]) -> set[int]:
    numbers = (name.removeprefix(f"{prefix}.").split(".")[0] for name in stored if name.startswith(f"{prefix}."))
    return {int(number) for number in numbers if number.isdigit()}


def _is_quantised(module: nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    return method is not None and not type(method).__name__.startswith("Unquantized")


def _name_matrix(name: str) -> str:
    return name.rpartition(".")[0]


def _need_not_come(module: nn.Module, name: str) -> bool:
    if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
        return not name.endswith("weight")  # quantised while it is loaded: the rest is made
    return OPTIONAL.fullmatch(name) is not None


def _shorten(name: str) -> str:
    """Return a name without `model.`, which drafters' checkpoints leave out."""
    return name.removeprefix("model.")


def _refuse(model: Any, missing: list[str]) -> None:
    if not missing:
        return
    drafter = getattr(model, "draft_model_config", None)
    where = drafter.model if drafter is not None else model.config.name_or_path or type(model).__name__
    named = ", ".join(missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    remedy = "fetch the checkpoint again, all of it"
    if all(name.endswith(BIAS) for name in missing):
        remedy += ", or store zeros for a router that was trained without"
    raise IncompleteError(f"{where}: expected a tensor for every parameter, got none for {named}{more}; {remedy}")
