"""Do a Laguna's tensors have the places and sizes that its config.json gives them? From their headers alone.

vLLM 0.32 cuts a matrix that is larger than its parameter as if it were another rank's share, fills a part of the
parameter with one that is smaller, and ends in an assertion without a word where neither goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from laguna_serve.plugins.layers import DENSE, PaddingError, read_widths
from laguna_serve.serving.checkpoint.fields import CheckpointError
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.checkpoint.parameters import EXPERTS, list_modules
from laguna_serve.serving.checkpoint.stored.weight_files import FETCH, TensorHeader, read_headers
from laguna_serve.serving.checkpoint.target import Target

LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
WEIGHT = ".weight"
# As safetensors calls the numbers that are a value each; what is packed has a layout of its own.
UNPACKED = ("F32", "F16", "BF16", "F8_E4M3")
# Transformers' name for what releases call `shared_expert`; vLLM knows theirs alone.
RENAMED = ".mlp.shared_experts."


def require_shapes(target: Target, folder: Path, *, cut_here: bool = False) -> None:
    """Raise CheckpointError, in one line, for a tensor that config.json has no place for, or of another size.

    `cut_here`: the experts that `target` has are cut out of whole ones while they load.
    """
    check_shapes(replace(target, experts=None) if cut_here else target, folder, read_headers(folder))


def check_shapes(target: Target, folder: Path, tensors: Mapping[str, TensorHeader]) -> None:
    """Do it for headers that were read. Raises as `require_shapes`."""
    for name in tensors:
        _require_place(target, folder, name)
    expected = dict(_list_shapes(target, folder))
    for name, tensor in tensors.items():
        shape = expected.get(EXPERT.sub(".experts.0.", _shorten(name)))
        if shape is not None and tensor.dtype in UNPACKED and tensor.shape != shape:
            as_said = f"{name} of {_show(shape)}, as config.json says"
            raise CheckpointError(f"{folder}: expected {as_said}, got {_show(tensor.shape)}; {FETCH}, with config.json")


def _require_place(target: Target, folder: Path, name: str) -> None:
    if RENAMED in name:
        remedy = "save it again by transformers' save_pretrained, without save_original_format=False"
        raise CheckpointError(
            f"{folder}: expected {name.replace(RENAMED, '.mlp.shared_expert.')}, got {name}; {remedy}"
        )
    for what, number, found in (
        ("layers", target.num_layers, LAYER.match(name)),
        ("experts", target.num_experts, EXPERT.search(name)),
    ):
        if found is not None and int(found[1]) >= number:
            as_said = f"{number} {what}, as config.json says"
            raise CheckpointError(f"{folder}: expected {as_said}, got {name}; {FETCH}, with config.json")


def _list_shapes(target: Target, folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the matrices of known sizes; one expert stands for all."""
    for module in list_modules(target):
        if EXPERTS not in module.name or target.experts is None:
            yield _shorten(module.name) + WEIGHT, (module.rows, module.columns)
    ends = ("embed_tokens", "lm_head")
    yield from ((end + WEIGHT, (target.vocab_size, target.hidden_size)) for end in ends)
    for layer, width in enumerate(_read_widths(folder)):
        if target.mlp_kinds[layer] == DENSE:
            name, wide = f"layers.{layer}.mlp", (width, target.hidden_size)
            yield from ((f"{name}.{part}{WEIGHT}", wide) for part in ("gate_proj", "up_proj"))
            yield f"{name}.down_proj{WEIGHT}", wide[::-1]


def _read_widths(folder: Path) -> list[int]:
    """Read the widths of an unpadded dense model's layers; none of any other's."""
    try:
        return read_widths(read_config(folder), str(folder)) or []
    except PaddingError as error:
        raise CheckpointError(str(error)) from None


def _shorten(name: str) -> str:
    """Return a name without what stands before its layer or end, which differs between formats."""
    return re.sub(r"^(?:.*\.)?(?=layers\.\d+\.|embed_tokens\.|lm_head\.)", "", name)


def _show(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"
