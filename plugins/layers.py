"""Which of a Laguna's layers are dense, how many heads each has, and how it rotates, from its config.json alone.

Plain Python, for the plugins, the launcher and the tools alike. Four spellings say which layers are dense:
`mlp_layer_types`, `mlp_only_layers`, `decoder_sparse_step` and `num_experts: 0`. vLLM from 0.31 on reads the first, as
transformers' LagunaConfig completes it, and the last: a config that has none of them is layer 0 dense and the rest
sparse, whatever the others say. Older vLLMs read the others. The rotary embedding has three: `rope_parameters` (flat,
or one per kind of layer), `rope_theta` with `rope_scaling`, and `rope_theta` alone, which transformers drops.

Read in transformers 5.19.0 (models/laguna/configuration_laguna.py) and vLLM 0.26.0 and 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

# What a config.json holds: whatever its maker wrote.
ConfigJson = Mapping[str, Any]
DENSE, SPARSE = "dense", "sparse"
FULL, SLIDING = "full_attention", "sliding_attention"
# Of a dense model that was unpadded: the width of every layer.
WIDTHS_KEY = "intermediate_size_per_layer"
# What LagunaConfig has for keys that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}


class Rope(TypedDict):
    """Parameters of the rotary embedding, as `rope_parameters` has them."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float


DEFAULT_ROPE: dict[str, Rope] = {
    FULL: {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}


class PaddingError(ValueError):
    """A layer or a config that does not describe a dense Laguna, as one line."""


class LayersError(ValueError):
    """A config.json whose kinds of layers are not clear, as one line without its subject."""


def read_setting(config: ConfigJson, key: str) -> Any:
    """Read a key's value, or LagunaConfig's default."""
    value = config.get(key)
    return DEFAULTS[key] if value is None else value


def resolve_layer_kinds(config: ConfigJson) -> list[str]:
    """Resolve the kind of every layer, dense or sparse.

    A model is dense when any of the keys says so of all layers: tools that make a dense model out of a mixture do not
    change every key. Otherwise `mlp_layer_types` goes before the older keys.

    Raises:
        LayersError: a list of another length or with other words.
    """
    count, experts = read_setting(config, "num_hidden_layers"), read_setting(config, "num_experts")
    stated, older = config.get("mlp_layer_types"), _read_older_keys(config, count)
    if stated is not None and (
        not isinstance(stated, list) or len(stated) != count or any(kind not in (DENSE, SPARSE) for kind in stated)
    ):
        got = f"{len(stated)} of {sorted(set(map(str, stated)))}" if isinstance(stated, list) else repr(stated)
        raise LayersError(f"expected mlp_layer_types to be {count} of {DENSE!r} and {SPARSE!r}, got {got}")
    dense = [DENSE] * count
    if experts == 0 or dense in (stated, older):
        return dense
    return list(stated or older or [DENSE, *[SPARSE] * (count - 1)])


def _read_older_keys(config: ConfigJson, count: int) -> list[str] | None:
    """Read the layers' kinds by `mlp_only_layers` and `decoder_sparse_step`; None without either.

    The second says every how many layers one is sparse.
    """
    only, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step")
    if only is None and step is None:
        return None
    only, step = ([0] if only is None else only), (1 if step is None else step)
    if not isinstance(only, list) or not all(type(layer) is int and 0 <= layer < count for layer in only):
        raise LayersError(f"expected mlp_only_layers to be layers from 0 to {count - 1}, got {only!r}")
    if type(step) is not int or step < 0:
        raise LayersError(f"expected decoder_sparse_step to be an integer from 0 on, got {step!r}")
    sparse = [step > 0 and layer not in only and (layer + 1) % step == 0 for layer in range(count)]
    return [SPARSE if kind else DENSE for kind in sparse]


def stock_layer_kinds(config: ConfigJson) -> list[str]:
    """Return the same as vLLM 0.32 takes it, with transformers' LagunaConfig."""
    count = read_setting(config, "num_hidden_layers")
    if read_setting(config, "num_experts") == 0:
        return [DENSE] * count
    return list(config.get("mlp_layer_types") or [DENSE, *[SPARSE] * (count - 1)])


def list_heads(config: ConfigJson) -> list[int]:
    """List every layer's attention heads: its own, or the one number for all. Raises KeyError without either."""
    own: list[int] | None = config.get("num_attention_heads_per_layer")
    return own or [config["num_attention_heads"]] * config["num_hidden_layers"]


def find_dropped_rope(config: ConfigJson) -> Rope | None:
    """Find the rotary parameters of a config that says `rope_theta` alone; None for one that says more, or nothing.

    transformers' LagunaConfig drops a lone `rope_theta` for its own defaults (theta 10,000 in sliding layers).
    """
    theta = config.get("rope_theta")
    if theta is None or config.get("rope_parameters") or config.get("rope_scaling"):
        return None
    factor = config.get("partial_rotary_factor")
    partial = 1.0 if factor is None else float(factor)
    return {"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": partial}


def read_widths(config: ConfigJson, name: str) -> list[int] | None:
    """Read the widths that an unpadded checkpoint's config.json lists, one for every layer; None if it lists none.

    Raises:
        PaddingError: something else than that; the message begins with `name`.
    """
    widths = config.get(WIDTHS_KEY)
    if widths is None:
        return None
    layers, most = config.get("num_hidden_layers"), config.get("intermediate_size")
    fits = isinstance(widths, list) and len(widths) == layers and all(type(width) is int for width in widths)
    if not fits or not all(1 <= width <= int(most or 0) for width in widths):
        expected = f"{WIDTHS_KEY} to be {layers} integers from 1 to {most}"
        raise PaddingError(f"{name}: expected {expected}, got {widths!r}; unpad the checkpoint again")
    return list(widths)
