"""How a checkpoint's weights are quantised, as its config.json says it.

Laguna's quantised releases are compressed-tensors (https://github.com/vllm-project/compressed-tensors): `config_groups`
say how the modules they target are stored, `ignore` which are not, and `kv_cache_scheme` asks for a KV cache in FP8.
What of it runs on which device is planning/support.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laguna_serve.plugins.formats.experts import COMPRESSED_TENSORS, FLOAT_QUANTIZED, are_patterns, matches
from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, Fields, show
from laguna_serve.serving.kit.results import JsonObject

FP8, NVFP4, INT4, OTHER = "fp8", "nvfp4", "int4", "other"
FORMATS = {FLOAT_QUANTIZED: FP8, "nvfp4-pack-quantized": NVFP4, "pack-quantized": INT4}
# Bytes of a stored weight with its scales: 128×128 blocks; 16 values with an FP8 scale; 4 or 8 bits and a bf16 scale.
FP8_BYTES, NVFP4_BYTES = 1 + 2 / 128**2, 1 / 2 + 1 / 16


@dataclass(frozen=True, slots=True)
class Group:
    """Modules stored alike: `bits` a weight, in groups of `group_size`, or with a scale for each block."""

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A quantised checkpoint.

    Attributes:
        method: quant_method, "compressed-tensors" or another that vLLM may know.
        kind: FP8, NVFP4 or INT4 for the three forms of the releases, OTHER for the rest.
        name: the format's own name ("float-quantized", …), or the method's.
        groups: in the config's order.
        ignore: modules that stay unquantised: names, or regular expressions after "re:".
        fp8_kv_cache: the checkpoint asks for a KV cache in FP8.
    """

    method: str
    kind: str
    name: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    fp8_kv_cache: bool

    def find_group(self, module: str) -> Group | None:
        """How a linear module's weights are stored; None for one that is not quantised."""
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        return next((group for group in self.groups if any(matches(t, module) for t in group.targets)), None)

    def weight_bytes(self, module: str) -> float:
        """Bytes of one of a linear module's weights, scales included; 2 for one that is not quantised."""
        group = self.find_group(module)
        if group is None:
            return 2.0
        if self.kind == FP8:
            return FP8_BYTES
        if self.kind == NVFP4:
            return NVFP4_BYTES
        return group.bits / 8 + (2 / group.group_size if group.group_size else 0)


def read_quantisation(folder: Path, config: ConfigJson) -> Quantisation | None:
    """Read what a config says of its quantisation; None for a plain checkpoint.

    Raises:
        CheckpointError: a description that cannot be read.
    """
    described = config.get("quantization_config") or config.get("compression_config")
    if not described:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else None
    if not isinstance(method, str) or not method.isprintable():
        remedy = "fetch it again"
        raise CheckpointError(
            f"{folder}: expected quantization_config with a quant_method, got {show(described)}; {remedy}"
        )
    scheme = described.get("kv_cache_scheme") or {}
    fp8_kv_cache = isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits") == 8
    if method != COMPRESSED_TENSORS:
        return Quantisation(method, OTHER, method, (), (), fp8_kv_cache)
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        expected = "quantization_config.config_groups to say how modules are stored"
        raise CheckpointError(f"{folder}: expected {expected}, got {show(groups)}; fetch it again")
    ignore = described.get("ignore") or []
    if not are_patterns(ignore):
        expected = "quantization_config.ignore to be a list of modules"
        raise CheckpointError(f"{folder}: expected {expected}, got {show(ignore)}; fetch it again")
    name = described.get("format") or next(iter(groups.values())).get("format")
    if not isinstance(name, str) or not name.isprintable():
        expected = "quantization_config.format to be a name"
        raise CheckpointError(f"{folder}: expected {expected}, got {show(name)}; fetch it again")
    return Quantisation(
        method=method,
        kind=FORMATS.get(name, OTHER),
        name=name,
        groups=tuple(_read_group(folder, key, group) for key, group in groups.items()),
        ignore=tuple(ignore),
        fp8_kv_cache=fp8_kv_cache,
    )


def find_rotation(config: ConfigJson) -> JsonObject | None:
    """Find what a config says of a rotated residual stream (R1 of SpinQuant, arXiv:2405.16406); None where it has none.

    The embedding and whatever adds to the stream are stored rotated, and what reads it is stored with the inverse: the
    model's output is the same, its hidden states are others. It stands in a quantised checkpoint's description, or
    beside where that was dequantised.
    """
    described = config.get("quantization_config") or config.get("compression_config")
    for place in (config, described):
        transform = place.get("transform_config") if isinstance(place, dict) else None
        groups = transform.get("config_groups") if isinstance(transform, dict) else None
        if isinstance(groups, dict) and any(map(_rotates_stream, groups.values())):
            return transform
    return None


def _rotates_stream(group: object) -> bool:
    """Whether a group of a transform_config is applied to what the embedding gives."""
    applied = group.get("apply") if isinstance(group, dict) else None
    for apply in applied if isinstance(applied, list) else ():
        targets = apply.get("targets") if isinstance(apply, dict) else None
        if (
            are_patterns(targets)
            and apply.get("location") == "weight_output"
            and any(matches(target, "model.embed_tokens") for target in targets)
        ):
            return True
    return False


def _read_group(folder: Path, key: str, group: JsonObject) -> Group:
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, dict) or not isinstance(weights.get("num_bits"), int) or not are_patterns(targets):
        expected = f"quantization_config.config_groups.{key} to have targets and weights.num_bits"
        raise CheckpointError(f"{folder}: expected {expected}, got {show(group)}; fetch it again")
    fields = Fields(folder, weights, f"quantization_config.config_groups.{key}.weights.")
    size = fields.integer("group_size") if "group_size" in fields.config else None
    blocks = weights.get("strategy") == "block"
    return Group(tuple(targets), fields.positive("num_bits"), None if size is None or size < 1 else size, blocks)
