"""How a Laguna's routed experts are stored, from its config.json alone: plain or FP8, whole or only some blocks.

Plain Python, for the plugins, the launcher and the tools alike.

A *base* holds every expert: in bf16, fp16 or fp32, or in FP8 as the releases have it, which is compressed-tensors'
`float-quantized` with a scale for each 128×128 block of a matrix (tensors `weight` and `weight_scale`). A *compact*
checkpoint (`laguna compact`) holds blocks of atoms, and its config.json says so:

    "expert_pruning": {"format": "plain" or "fp8", "block_size": 64, "blocks_per_expert": 8, "kept_blocks": [per layer]}

`format` is absent from checkpoints older than FP8, which are plain. In "fp8" every atom's gate row, up row and down
column has its own scale for each 128 columns of the hidden size.

Read in compressed-tensors 0.14 (quantization_args.py) and vLLM 0.32.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from laguna_serve.plugins.layers import SPARSE, read_setting, resolve_layer_kinds

PLAIN, FP8 = "plain", "fp8"
FORMATS = (PLAIN, FP8)
# What kernels/sentinel_moe takes: multiples of these atoms and hidden columns, and so many experts of a token.
MULTIPLE, MOST_CHOSEN = 16, 16
# Rows and columns of a weight block that share a scale; columns of an atom that do.
SCALE_BLOCK = 128
COMPRESSED_TENSORS = "compressed-tensors"
FLOAT_QUANTIZED = "float-quantized"
# compressed-tensors' formats whose down projections pack neighbouring atoms: their name, and what of them is served.
PACKED = {
    "nvfp4-pack-quantized": ("NVFP4", "16 atoms", "a GPU that Marlin or FP4 arithmetic runs on"),
    "pack-quantized": ("INT4", "a group of atoms", "a GPU of compute capability 8.0 or later"),
}


class ExpertFormatError(ValueError):
    """Experts that cannot be cut into blocks, or a config that does not say how they are, as one line."""


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """The routed experts of a compact checkpoint: `kept_blocks` of each sparse layer, of `block_size` atoms."""

    format: str
    block_size: int
    blocks_per_expert: int
    kept_blocks: tuple[int, ...]


def read_stored_experts(config: Mapping[str, Any], name: str) -> StoredExperts | None:
    """Return what `expert_pruning` says is stored; None without it, and for masks that cut a base while it loads.

    Raises:
        ExpertFormatError: it describes no pruned Laguna; the message begins with `name`.
    """
    described = config.get("expert_pruning")
    if not described or (isinstance(described, Mapping) and "keep_mask" in described):
        return None
    if not isinstance(described, Mapping):
        raise ExpertFormatError(f"{name}: expected expert_pruning to be an object, got {described!r}; {_AGAIN}")
    return check_stored_experts(config, described, name)


def check_stored_experts(config: Mapping[str, Any], described: Mapping[str, Any], name: str) -> StoredExperts:
    """Check a completed `expert_pruning` against the config it stands in. Raises as `read_stored_experts`."""
    kept, block, most = (described.get(key) for key in ("kept_blocks", "block_size", "blocks_per_expert"))
    layers = resolve_layer_kinds(config).count(SPARSE)
    width, experts = read_setting(config, "moe_intermediate_size"), read_setting(config, "num_experts")
    if not isinstance(kept, list) or len(kept) != layers or not all(type(count) is int for count in kept):
        expected = f"kept_blocks to be one number for each of {layers} sparse layers"
        raise ExpertFormatError(f"{name}: expected expert_pruning.{expected}, got {kept!r}; {_AGAIN}")
    if type(block) is not int or type(most) is not int or block * most != width:
        expected = f"block_size × blocks_per_expert to be {width}"
        raise ExpertFormatError(f"{name}: expected expert_pruning.{expected}, got {block!r} × {most!r}; {_AGAIN}")
    if any(not 0 <= count <= experts * most for count in kept):
        expected = f"kept_blocks to be from 0 to {experts * most}, {most} of each of {experts} experts"
        raise ExpertFormatError(f"{name}: expected expert_pruning.{expected}, got {kept!r}; {_AGAIN}")
    stored = described.get("format", PLAIN)
    if stored not in FORMATS:
        expected, remedy = " or ".join(map(repr, FORMATS)), "a newer version wrote it: update, or make it again"
        raise ExpertFormatError(f"{name}: expected expert_pruning.format to be {expected}, got {stored!r}; {remedy}")
    return StoredExperts(stored, block, most, tuple(kept))


def find_unserved(block_size: int, hidden_size: int, chosen: int) -> str | None:
    """Find which size of a pruned Laguna its kernels do not take, as a line without subject; None if they take all."""
    if block_size % MULTIPLE:
        remedy = f"cut the base again, into such blocks (--block-size {MULTIPLE}) or --zeroed"
        return f"expected blocks of a multiple of {MULTIPLE} atoms, got {block_size}; {remedy}"
    if hidden_size % MULTIPLE:
        return f"expected a hidden_size that is a multiple of {MULTIPLE}, got {hidden_size}; cut the base --zeroed"
    if chosen > MOST_CHOSEN:
        return f"expected num_experts_per_tok of at most {MOST_CHOSEN}, got {chosen}; cut the base --zeroed"
    return None


def read_base_format(config: Mapping[str, Any], name: str, what: str = "experts") -> str:
    """Read how a base stores its routed experts, or a dense model its `what`: PLAIN or FP8.

    Raises:
        ExpertFormatError: in another way, in which no atom can be taken out; the message begins with `name`.
    """
    for key in ("quantization_config", "compression_config"):
        described = config.get(key)
        if described:
            return _read_quantised(described, key, name, what)
    return PLAIN


def _read_quantised(described: Any, key: str, name: str, what: str) -> str:
    method = described.get("quant_method", "unnamed") if isinstance(described, Mapping) else described
    groups = described.get("config_groups") if isinstance(described, Mapping) else None
    if method != COMPRESSED_TENSORS or not isinstance(groups, Mapping):
        raise _refuse(name, what, f"{key} of method {method!r}", f"{_BASES}; {_WHOLE}")
    targets = [group.get("targets", []) for group in groups.values() if isinstance(group, Mapping)]
    for setting, patterns in (("ignore", described.get("ignore") or []), *(("targets", each) for each in targets)):
        if not are_patterns(patterns):
            expected = f"{key}.{setting} to be a list of modules"
            raise ExpertFormatError(f"{name}: expected {expected}, got {patterns!r}; fetch config.json again")
    group = _find_group(described, groups)
    if group is None:
        return PLAIN
    form = group.get("format") or described.get("format")
    if form in PACKED:
        kind, share, device = PACKED[form]
        reason = f"its down projections pack neighbouring atoms into bytes and give {share} one scale"
        remedy = f"cut the bf16 or FP8 release, or serve this one whole, with its drafter, on {device}"
        raise _refuse(name, what, f"{kind} ({form}): {reason}, so that values would change", remedy)
    weights = group.get("weights")
    blocks = weights.get("block_structure") if isinstance(weights, Mapping) else None
    eight = isinstance(weights, Mapping) and weights.get("num_bits") == 8 and weights.get("type") == "float"
    if form != FLOAT_QUANTIZED or not eight or blocks != [SCALE_BLOCK, SCALE_BLOCK]:
        strategy = weights.get("strategy") if isinstance(weights, Mapping) else None
        got = f"{form!r} with strategy {strategy!r}, block_structure {blocks!r}"
        raise _refuse(name, what, got, f"{_BASES}; {_WHOLE}")
    return FP8


def _find_group(described: Mapping[str, Any], groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the group that stores feed-forward matrices; None where they are left unquantised."""
    module = "model.layers.1.mlp.experts.0.down_proj"
    if any(matches(pattern, module) for pattern in described.get("ignore") or []):
        return None
    return next(
        (
            g
            for g in groups.values()
            if isinstance(g, Mapping) and any(matches(t, module) for t in g.get("targets", []))
        ),
        None,
    )


def are_patterns(names: object) -> TypeGuard[list[str]]:
    """Whether these are names of modules, or regular expressions after "re:"."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    try:
        for name in names:
            if name.startswith("re:"):
                re.compile(name[3:])
    except re.error:
        return False
    return True


def matches(pattern: str, module: str) -> bool:
    """compressed-tensors' rule: a regular expression from the name's beginning, a name, or a class of modules."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, "Linear")


_AGAIN = "make the checkpoint again"
_BASES = f"pass the bf16 release, or the FP8 one ({SCALE_BLOCK}×{SCALE_BLOCK} blocks)"
_WHOLE = "a quantised one is served whole, as it is"


def _refuse(name: str, what: str, got: str, remedy: str) -> ExpertFormatError:
    expected = f"plain {what} or FP8 ones in blocks of {SCALE_BLOCK}×{SCALE_BLOCK}"
    return ExpertFormatError(f"{name}: expected {expected}, got {got}; {remedy}")
