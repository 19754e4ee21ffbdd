"""Does a Laguna's checkpoint have all of its tensors? From the headers of its files; only tied layers are read.

vLLM 0.32 does not miss a linear layer's, an embedding's or the output layer's weights (`track_weights_loading` passes
over every module with a quantisation method, which the unquantised ones have, too): it serves what lay in memory.
Training that ties the output layer to the embedding leaves it out, and a merge that was broken off leaves out more.

Names differ between formats, so that layers are held against each other: each has the projections, norms and routers
that the others of its kind have. What a quantiser adds to some layers and not to others is its own affair. Output
gates and selection biases have one name in all of them, and vLLM serves what lay in memory, or zeros, where a model has
none at all.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from laguna_serve.plugins.formats.experts import COMPRESSED_TENSORS
from laguna_serve.plugins.layers import DENSE
from laguna_serve.serving.checkpoint.fields import CheckpointError
from laguna_serve.serving.checkpoint.stored.weight_files import (
    FETCH,
    LENGTH_BYTES,
    TensorHeader,
    check_file,
    list_weights,
    read_headers,
)
from laguna_serve.serving.checkpoint.target import Target

LAYERED = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)\.[^.]+")
EVERYWHERE = re.compile(r"(?:.*\.)?(?:\w+_proj|\w*norm|gate)")
GATE, BIAS = "self_attn.g_proj", "mlp.experts.e_score_correction_bias"
BIASED = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.(?:experts|gate)\.e_score_correction_bias")
WEIGHT = ".weight"
ENDS = ("embed_tokens", "norm", "lm_head")
# Read at once, of a tensor that is compared.
PIECE = 1 << 24


def require_tensors(target: Target, folder: Path) -> None:
    """Raise CheckpointError, in one line, for a tensor that is missing, or for one too many.

    It is of safetensors alone, where there are some.
    """
    files = {path: check_file(path) for path in list_weights(folder)}
    names = [name for tensors in files.values() for name in tensors]
    if not names:
        return
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        where = " and ".join(path.name for path, tensors in files.items() if doubled[0] in tensors)
        raise CheckpointError(f"{folder}: expected every tensor once, got {doubled[0]} in {where}; {FETCH}")
    if target.tied:
        _refuse_another_head(folder, files)
    if missing := list_missing(target, names):
        more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        remedy = 'or say "tie_word_embeddings": true, if they are' if missing == ["lm_head"] else "all of it"
        raise CheckpointError(f"{folder}: expected tensors of {missing[0]}{more}, got none; {FETCH}, {remedy}")


def require_numbers(target: Target, folder: Path) -> None:
    """Raise CheckpointError, in one line, for a matrix in FP8 without what says how it is scaled.

    vLLM takes its values for the weights where config.json says nothing of them.
    """
    tensors = read_headers(folder)
    matrices = [name for name, tensor in tensors.items() if name.endswith(WEIGHT) and tensor.dtype.startswith("F8_")]
    if matrices and target.quantisation is None:
        got = f"{min(matrices)} in {tensors[min(matrices)].dtype}"
        remedy = "fetch config.json again, with its quantization_config"
        raise CheckpointError(f"{folder}: expected plain weights, as config.json says, got {got}; {remedy}")
    if target.quantisation is None or target.quantisation.method != COMPRESSED_TENSORS:
        return
    if lone := [name for name in matrices if f"{name}_scale" not in tensors]:
        other = f"{min(lone)}_scale_inv"
        got = f"{other}: another format's" if other in tensors else "none"
        raise CheckpointError(f"{folder}: expected {min(lone)}_scale, as config.json says, got {got}; {FETCH}")


def list_missing(target: Target, names: Collection[str]) -> list[str]:
    """List the modules of which a checkpoint has no tensor; `names` are those that it has.

    Pruned experts are not looked at: which of them a layer has is its own affair.
    """
    ends = [end for end in ENDS if not (end == "lm_head" and target.tied) and not _has(names, end)]
    return [*ends, *_list_lacking(target, names), *_list_unbiased(target, names)]


def _has(names: Iterable[str], end: str) -> bool:
    """Whether a module at either end of the model has a tensor."""
    return any(LAYERED.fullmatch(name) is None and end in name.split(".")[:-1] for name in names)


def _refuse_another_head(folder: Path, files: Mapping[Path, Mapping[str, TensorHeader]]) -> None:
    """Refuse an output layer of its own where the embedding is said to be it: vLLM loads both into one matrix."""
    stored = {
        end: _digest(path, tensor)
        for path, tensors in files.items()
        for name, tensor in tensors.items()
        for end in ("embed_tokens", "lm_head")
        if name.endswith(f"{end}.weight") and LAYERED.fullmatch(name) is None
    }
    if len(stored) == 2 and len(set(stored.values())) == 2:
        remedy = 'say "tie_word_embeddings": false, or leave it out'
        raise CheckpointError(
            f"{folder}: expected lm_head to be embed_tokens, as config.json ties them, got another; {remedy}"
        )


def _digest(path: Path, tensor: TensorHeader) -> bytes:
    begin, end = tensor.data_offsets
    digest = hashlib.blake2b(f"{tensor.dtype} {tensor.shape}".encode())
    with path.open("rb") as file:
        file.seek(LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little") + begin)
        for left in range(end - begin, 0, -PIECE):
            digest.update(file.read(min(PIECE, left)))
    return digest.digest()


def _list_lacking(target: Target, names: Iterable[str]) -> list[str]:
    """List what a layer lacks that another one of its kind has."""
    found: dict[int, set[str]] = defaultdict(set)
    for name in names:
        match = LAYERED.fullmatch(name)
        if match and EVERYWHERE.fullmatch(match[2]) and not (target.pruned and ".experts." in name):
            found[int(match[1])].add(match[2])
    gates = {GATE} if target.gate_width else set()
    usual: dict[str, set[str]] = {kind: set(gates) for kind in target.mlp_kinds}
    for index, kind in enumerate(target.mlp_kinds):
        usual[kind] |= found[index]
    kinds = enumerate(target.mlp_kinds)
    return [f"layers.{index}.{part}" for index, kind in kinds for part in sorted(usual[kind] - found[index])]


def _list_unbiased(target: Target, names: Iterable[str]) -> list[str]:
    """List the selection biases that routers lack; transformers' router always has some, whatever the config says."""
    biased = {int(match[1]) for match in map(BIASED.fullmatch, names) if match}
    kinds = enumerate(target.mlp_kinds)
    return [f"layers.{index}.{BIAS}" for index, kind in kinds if kind != DENSE and index not in biased]
