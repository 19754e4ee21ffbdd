"""Laguna with dense layers alone, each at its true width.

Stock vLLM gives every layer the config's one `intermediate_size` and so holds, and reads for every token, the zeros
that narrower layers are padded with. Here a checkpoint's files are scanned before anything is allocated (padding.py),
or the config says the widths (`laguna unpad` writes them); the padding is cut off on the host while the weights are
loaded. Gate and up are one matrix, as in vLLM's other dense models.

Checkpoints in FP8 (compressed-tensors, 128×128 blocks) are dequantised on a CPU (fp8_layers.py). On a GPU an unpadded
one has vLLM's own layers at its widths, with gate and up apart; one with its padding is left to stock vLLM.

Read in vLLM 0.26.0, 0.29.0 and 0.32.0, run on 0.32.0. Tensor parallelism and other quantised weights are refused.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf, filter_duplicate_safetensors_files
from vllm.model_executor.models import laguna
from vllm.platforms import current_platform

from laguna_serve.plugins.formats.completeness import refuse_incomplete
from laguna_serve.plugins.formats.experts import read_base_format
from laguna_serve.plugins.layers import DENSE, WIDTHS_KEY, PaddingError, read_widths
from laguna_serve.plugins.models.fp8_layers import (
    build_unquantised,
    check_method,
    dequantise_linears,
    dequantises,
)
from laguna_serve.plugins.padding import Units, is_dense, round_width, scan_layers

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what its own loggers say

INDEX = "model.safetensors.index.json"
# vLLM's load formats that read safetensors files from a folder.
FILE_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
SLOTS = {"gate_proj.weight": 0, "up_proj.weight": 1}


class DenseMLP(nn.Module):
    """SwiGLU of `units.width` units, in `width` places of which the last may be zeros that round it up."""

    def __init__(self, hidden_size: int, units: Units, width: int, prefix: str) -> None:
        super().__init__()
        self.units, self.width, self.prefix = units, width, prefix
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [width] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(width, hidden_size, bias=False, prefix=f"{prefix}.down_proj")
        self.act_fn = SiluAndMul()
        self._missing = set(SLOTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, H] → […, H]."""
        gate_up, _ = self.gate_up_proj(x)
        out: torch.Tensor = self.down_proj(self.act_fn(gate_up))[0]
        return out

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Load what the checkpoint has under `mlp.`; vLLM's loader calls it, perhaps in several goes.

        Yields what was set; the merged matrix once both of its halves have come: vLLM refuses to start without.
        """
        for name, tensor in weights:
            if name == "down_proj.weight":
                self.down_proj.weight.weight_loader(self.down_proj.weight, self._fit(name, tensor, dim=1))
                yield name
            elif name in SLOTS:
                matrix = self.gate_up_proj.weight
                matrix.weight_loader(matrix, self._fit(name, tensor, dim=0), SLOTS[name])
                self._missing.discard(name)
                if not self._missing:
                    self._missing = set(SLOTS)  # of the next time that weights are loaded
                    yield "gate_up_proj.weight"
            else:
                raise self._mismatch("gate_proj, up_proj and down_proj", name)

    def _fit(self, name: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Fit the kept units of a padded matrix or all of an unpadded one, with zeros up to the allocated width."""
        stored, width = tensor.shape[dim], self.units.width
        if stored == self.units.stored:
            kept = self.units.trim(tensor, dim)
            if width < stored and self.units.padding.trim(tensor, dim).any():
                raise self._mismatch(f"{name} with zeros in the {stored - width} units cut off", "other values there")
        elif stored == width:
            kept = tensor
        else:
            raise self._mismatch(f"{name} of {width} units, or {self.units.stored} with the padding", stored)
        missing = (0, 0) * (1 - dim) + (0, self.width - width)
        return F.pad(kept, missing) if self.width > width else kept

    def _mismatch(self, expected: str, got: object) -> PaddingError:
        return PaddingError(f"{self.prefix}: expected {expected}, got {got}; start the engine on that checkpoint")


class LagunaDenseForCausalLM(laguna.LagunaForCausalLM):  # type: ignore[misc]
    """vLLM's Laguna whose dense layers are as wide as the checkpoint's, without the padding."""

    packed_modules_mapping: ClassVar = {  # adapters are for the parts
        **laguna.LagunaForCausalLM.packed_modules_mapping,
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        _refuse_what_is_not_supported(vllm_config)
        config.mlp_layer_types = [DENSE] * config.num_hidden_layers  # whichever key said so
        layers = _find_layers(vllm_config)
        widths = [units.width for units in layers]
        if not current_platform.is_cpu() and vllm_config.quant_config is None:
            widths = [round_width(units.width, units.stored) for units in layers]
        # vLLM's compile cache hashes the config: other widths are another model.
        setattr(config, WIDTHS_KEY, [units.width for units in layers])
        # Built with feed-forward layers of width 1, which are then replaced: vLLM's own would hold the padding.
        narrow = copy.copy(config)
        narrow.intermediate_size = 1
        narrow.num_experts = 0  # up to 0.30 vLLM does not look at mlp_layer_types
        plain = dequantises(vllm_config)
        inner = build_unquantised(vllm_config.with_hf_config(narrow), only_feed_forward=not plain)
        super().__init__(vllm_config=inner, prefix=prefix)
        self._dequantises = plain
        self.config = self.model.config = config
        quant_config = None if plain else vllm_config.quant_config
        for number in range(self.model.start_layer, self.model.end_layer):
            name = f"{prefix}.model.layers.{number}.mlp".lstrip(".")
            sizes = (config.hidden_size, widths[number])
            self.model.layers[number].mlp = (
                DenseMLP(sizes[0], layers[number], sizes[1], name)
                if quant_config is None
                else laguna.LagunaMLP(*sizes, config.hidden_act, quant_config, prefix=name)
            )
        _log_widths(layers, widths, config.hidden_size)

    @refuse_incomplete
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were set."""
        loaded: set[str] = super().load_weights(dequantise_linears(weights) if self._dequantises else weights)
        return loaded


def _find_layers(vllm_config: VllmConfig) -> list[Units]:
    """Every layer's units: from the config of an unpadded checkpoint, else from its files."""
    config = vllm_config.model_config.hf_config
    stored, layers = config.intermediate_size, config.num_hidden_layers
    widths = read_widths(config.to_dict(), str(config.name_or_path or "config.json"))
    if widths is not None:
        return [Units(stored, ((0, width),)) for width in widths]
    whole = Units(stored, ((0, stored),))
    files = _find_files(vllm_config)
    started = time.monotonic()
    found = scan_layers(files, layers) if files else {}
    if files:
        logger.info("Looked for padding in %d layers in %.2f s", len(found), time.monotonic() - started)
    for number, units in found.items():
        if units.stored != stored:
            expected = f"{stored} units, config.json's intermediate_size"
            raise PaddingError(f"model.layers.{number}.mlp: expected {expected}, got {units.stored}; fetch it again")
    broken = {number: units.broken for number, units in found.items() if units.broken is not None}
    if broken:
        number, unit = next(iter(broken.items()))
        logger.warning(
            "Padding that is not exactly zero: %d of %d layers are kept whole (the first is layer %d, where unit %d is "
            "zero in part only); pad the checkpoint again to save the memory",
            *(len(broken), layers, number, unit),
        )
    return [found.get(number, whole) for number in range(layers)]


def _find_files(vllm_config: VllmConfig) -> list[Path]:
    """Find the checkpoint's safetensors files, downloaded if need be; none where weights come in another way."""
    load, model = vllm_config.load_config, vllm_config.model_config
    if load.load_format not in FILE_FORMATS:
        logger.info("Load format %s: layers are kept at the width that config.json says", load.load_format)
        return []
    folder = Path(model.model)
    if not folder.is_dir():
        folder = Path(
            download_weights_from_hf(
                model.model,
                load.download_dir,
                allow_patterns=["*.safetensors"],
                revision=model.revision,
                ignore_patterns=load.ignore_patterns,
            )
        )
    files = sorted(str(path) for path in folder.glob("*.safetensors"))
    # Some folders hold the same tensors twice; the index says which files vLLM will load.
    return [Path(file) for file in filter_duplicate_safetensors_files(files, str(folder), INDEX)]


def _log_widths(layers: list[Units], widths: list[int], hidden_size: int) -> None:
    stored, true = (3 * hidden_size * sum(sizes) for sizes in ([u.stored for u in layers], [u.width for u in layers]))
    rounding = 3 * hidden_size * (sum(widths) - sum(units.width for units in layers))
    logger.info(
        "Feed-forward layers at their true widths: %s of %s parameters, and %s to round widths up",
        *(f"{true:,}", f"{stored:,}", f"{rounding:,}"),
    )


def _refuse_what_is_not_supported(vllm_config: VllmConfig) -> None:
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    remedy = """serve it with --hf-overrides '{"architectures": ["LagunaForCausalLM"]}'"""
    if not is_dense(config.to_dict()):
        raise PaddingError(f"LagunaDenseForCausalLM: expected dense layers alone, got sparse ones; {remedy}")
    if parallel.tensor_parallel_size > 1:
        size = parallel.tensor_parallel_size
        raise PaddingError(f"LagunaDenseForCausalLM: expected one device, got tensor parallel size {size}; {remedy}")
    try:
        check_method(vllm_config, "LagunaDenseForCausalLM", remedy)
        if vllm_config.quant_config is not None:
            read_base_format(config.to_dict(), "LagunaDenseForCausalLM", "layers")
    except ValueError as error:
        raise PaddingError(str(error)) from None
    on_gpu = vllm_config.quant_config is not None and not current_platform.is_cpu()
    if on_gpu and getattr(config, WIDTHS_KEY, None) is None:
        expected = "true widths in FP8 on a GPU, got padding; `laguna unpad` it, or"
        raise PaddingError(f"LagunaDenseForCausalLM: expected {expected} {remedy}")
