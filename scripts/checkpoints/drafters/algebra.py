"""What of a DFlash drafter can be said in the other format, worked out on its tensors.

Write N(x) = x / rms(x), h₁ … hₖ for the target's states at the taps, y for a block row, W for a layer's queries, keys
and values. The architectures differ in the context c and in what a layer makes of it:

    Laguna        c = a ⊙ N(F [w₁ ⊙ N(h₁) … wₖ ⊙ N(hₖ)]),  keys and values W (v ⊙ N(c)),  block rows W (v ⊙ N(y))
    speculators   c = a ⊙ N(F [h₁ … hₖ]),                   keys and values W c,           block rows W (v ⊙ N(y))

Besides, Laguna's heads may have an output gate, and the speculators' drafter a vocabulary of its own.

- With one tap N(h₁) is a positive factor per token, which the outer N takes away again, up to the epsilon in rms: w₁
  folds into F, and in the other direction is 1. With several taps their relative sizes differ from token to token: it
  does not carry over.
- N(c) = u for the unit-rms u = c / a if a is the same in every place: then v folds into W, and a and v become 1. In
  the other direction W (a ⊙ u) must be W (v ⊙ u): a and v must be equal in every layer.
- A gate whose matrix is zero multiplies with softplus(0) = ln 2, which folds into the output projection.
- Laguna's drafter uses the target's embedding and head; a drafter with others cannot be said in its format.
- The speculators' drafter has no sequential head.

Source: models/laguna_dflash.py and models/qwen3_dflash.py of vLLM 0.32.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch

from laguna_serve.plugins.formats.sequential_head import HEAD
from laguna_serve.plugins.layers import SPARSE, list_heads, resolve_layer_kinds
from laguna_serve.scripts.checkpoints.drafters.layout import (
    SHARED_KEYS,
    describe_laguna,
    describe_speculators,
    read_block_size,
    read_layer_types,
    read_rope,
)
from laguna_serve.scripts.checkpoints.drafters.speculators import list_tables
from laguna_serve.serving.checkpoint import ConfigJson, read_dtype

Tensors = dict[str, torch.Tensor]
QKV = re.compile(r"layers\.(\d+)\.self_attn\.qkv_proj\.weight")
KNOWN_LAGUNA = re.compile(
    r"(fc|hidden_norm|norm|aux_hidden_norms\.\d+|layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|mlp\.(gate|up|down)_proj|self_attn\.(qkv|o|g)_proj|self_attn\.[qk]_norm))\.weight"
)
KNOWN_SPECULATORS = re.compile(
    r"d2t|t2d|(fc|hidden_norm|norm|lm_head|embed_tokens|layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|mlp\.(gate|up|down)_proj|self_attn\.[qkvo]_proj|self_attn\.[qk]_norm))\.weight"
)


@dataclass(slots=True)
class Conversion:
    """The drafter in the other format, and what happened to each part on the way.

    `lost` is what does not carry over, with the reason; the tensors are only right when it is empty.
    """

    config: ConfigJson = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def to_speculators(
    config: ConfigJson, tensors: Tensors, head: torch.Tensor, vocabulary: torch.Tensor | None, verifier: str
) -> Conversion:
    """Convert a drafter from Laguna's format to speculators'.

    Args:
        config, tensors: of the drafter.
        head: the target's [V, H].
        vocabulary: the target's tokens that will be drafted, [V'] int64 rising; None for all of them.
        verifier: name of the target, for the config.
    """
    done = Conversion()
    layers, heads = config["num_hidden_layers"], list_heads(config)
    if HEAD in config["dflash_config"]:
        done.lost["sequential head"] = "the speculators' drafter chooses all places of a block at once"
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{HEAD}.")}
    _note_unknown(done, tensors, KNOWN_LAGUNA)
    _drop_tap_norms(done, tensors, config)
    gate = _fold_gates(done, tensors, layers)
    if len(set(heads)) > 1:
        done.lost["heads per layer"] = f"{heads}: Qwen3's layers have equally many"
    if SPARSE in resolve_layer_kinds(config):
        done.lost["experts"] = "Qwen3's layers are dense"
    constant = _is_constant(tensors["hidden_norm.weight"])
    if constant:
        done.carried["input norms"] = "folded into queries, keys and values, as hidden_norm's weight is constant"
    else:
        reason = "a layer normalises the context once more, by a factor that changes from token to token"
        done.lost["input norms on the context"] = f"{reason}, as hidden_norm's weight is not constant"
    for name, tensor in tensors.items():
        match = QKV.fullmatch(name)
        if match is not None:
            sizes = [heads[int(match[1])], *[config["num_key_value_heads"]] * 2]
            scale = tensors[f"layers.{match[1]}.input_layernorm.weight"].float() if constant else torch.ones(1)
            folded = (tensor.float() * scale).to(tensor.dtype)
            for part, rows in zip("qkv", folded.split([n * config["head_dim"] for n in sizes]), strict=True):
                done.tensors[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "aux_hidden_norms" in name or ".g_proj." in name or name == "fc.weight":
            continue
        elif name == "hidden_norm.weight" or name.endswith(".input_layernorm.weight"):
            done.tensors[name] = torch.ones_like(tensor)
        elif name.endswith(".o_proj.weight"):
            done.tensors[name] = (tensor.float() * gate).to(tensor.dtype)
        else:
            done.tensors[name] = tensor
    tap = tensors.get("aux_hidden_norms.0.weight")
    fc = tensors["fc.weight"]
    done.tensors["fc.weight"] = (
        fc if tap is None or fc.shape[1] != len(tap) else (fc.float() * tap.float()).to(fc.dtype)
    )
    _narrow(done, head, vocabulary)
    done.config = _speculators_config(config, verifier, len(head) if vocabulary is None else len(vocabulary))
    return done


def to_laguna(
    config: ConfigJson, tensors: Tensors, head: torch.Tensor, embedding: torch.Tensor, target_layers: int
) -> Conversion:
    """From the speculators format; head and embedding [V, H] and the number of layers are the target's."""
    done = Conversion()
    layers = config["transformer_layer_config"]
    taps = len(config["aux_hidden_state_layer_ids"])
    _note_unknown(done, tensors, KNOWN_SPECULATORS)
    if taps > 1:
        reason = f"the {taps} taps go into fc as they are, and Laguna's drafter normalises each by a factor per token"
        done.lost["taps without norms"] = reason
    else:
        done.carried["tap"] = "gets a norm of weight 1, which hidden_norm takes away again"
    if layers.get("attention_bias"):
        done.lost["attention biases"] = "Laguna's drafter has none"
    if len(set(layers.get("layer_types") or ["full_attention"])) > 1:
        done.lost["mixed layer types"] = "Laguna's drafter needs layers of one kind"
    _check_vocabulary(done, config, tensors, head)
    if "embed_tokens.weight" in tensors and not _equal(tensors["embed_tokens.weight"], embedding):
        done.lost["embedding"] = "it is not the target's, which Laguna's drafter uses"
    norm = tensors["hidden_norm.weight"].float()
    norms = [tensors[f"layers.{i}.input_layernorm.weight"].float() for i in range(layers["num_hidden_layers"])]
    if all(torch.equal(norm, other) for other in norms):
        done.carried["context norm"] = "equals every layer's input norm, which Laguna applies to the context"
    else:
        reason = "Laguna's layers apply their input norms to the context, which must then equal hidden_norm"
        done.lost["context norm"] = f"{reason}; here they differ"
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d", "lm_head.weight", "embed_tokens.weight") or re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            done.tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        else:
            done.tensors[name] = tensor
    done.tensors["hidden_norm.weight"] = torch.ones_like(tensors["hidden_norm.weight"])
    width = config.get("target_hidden_size") or layers["hidden_size"]
    for tap in range(taps):
        done.tensors[f"aux_hidden_norms.{tap}.weight"] = torch.ones(width, dtype=tensors["fc.weight"].dtype)
    done.carried["output gate"] = "none, as before (gating: false)"
    done.config = _laguna_config(config, target_layers)
    return done


def _note_unknown(done: Conversion, tensors: Tensors, known: re.Pattern[str]) -> None:
    unknown = sorted(name for name in tensors if known.fullmatch(name) is None)
    if unknown:
        done.lost["further tensors"] = ", ".join(unknown[:4]) + (", …" if len(unknown) > 4 else "")


def _drop_tap_norms(done: Conversion, tensors: Tensors, config: ConfigJson) -> None:
    taps = len(config["dflash_config"]["target_layer_ids"])
    if taps == 1:
        done.carried["tap norm"] = "folded into fc; its factor per token is taken away by hidden_norm"
    else:
        reason = f"each of the {taps} taps is divided by its own size, which changes from token to token"
        done.lost["tap norms"] = f"{reason}; the speculators' drafter has none"
    assert all(f"aux_hidden_norms.{tap}.weight" in tensors for tap in range(taps))


def _fold_gates(done: Conversion, tensors: Tensors, layers: int) -> float:
    """Fold the gates to the constant that they come to, for the output projections."""
    gates = [tensors.get(f"layers.{layer}.self_attn.g_proj.weight") for layer in range(layers)]
    present = [gate for gate in gates if gate is not None]
    if not present:
        done.carried["output gate"] = "none"
        return 1.0
    if len(present) == layers and not any(gate.any() for gate in present):
        done.carried["output gate"] = "folded into the output projections: its matrices are zero, a factor of ln 2"
        return math.log(2)
    done.lost["output gate"] = "every head's output is scaled by a function of the input; Qwen3's heads have no gate"
    return 1.0


def _narrow(done: Conversion, head: torch.Tensor, vocabulary: torch.Tensor | None) -> None:
    if vocabulary is None:
        done.carried["embedding and head"] = "the target's, as before"
        return
    done.tensors["lm_head.weight"] = head[vocabulary].clone()
    done.tensors |= list_tables(vocabulary, len(head))
    done.carried["head"] = f"{len(vocabulary)} of the target's {len(head)} rows: other tokens are never drafted"
    done.carried["embedding"] = "the target's, as before"


def _check_vocabulary(done: Conversion, config: ConfigJson, tensors: Tensors, head: torch.Tensor) -> None:
    drafted = config["draft_vocab_size"]
    if drafted != len(head):
        done.lost["reduced vocabulary"] = f"{drafted} of {len(head)} tokens; Laguna's drafter has the target's head"
        return
    tokens = torch.arange(drafted) + tensors.get("d2t", torch.zeros(drafted, dtype=torch.int64))
    own = tensors.get("lm_head.weight")
    if own is not None and not _equal(own, head[tokens]):
        done.lost["head"] = "it is not the target's, which Laguna's drafter uses"
    else:
        done.carried["head"] = "the target's, as before"


def _speculators_config(config: ConfigJson, verifier: str, drafted: int) -> ConfigJson:
    layers = {key: config[key] for key in (*SHARED_KEYS, "sliding_window") if config.get(key) is not None}
    layers |= {
        "layer_types": read_layer_types(config),
        "num_attention_heads": list_heads(config)[0],
        "rope_parameters": read_rope(config),
    }
    dflash = config["dflash_config"]
    return describe_speculators(
        layers,
        verifier=verifier,
        draft_vocab_size=drafted,
        target_hidden_size=config["hidden_size"],
        layer_ids=dflash["target_layer_ids"],
        block_size=read_block_size(config),
        mask_token_id=dflash["mask_token_id"],
        causal=dflash.get("causal", False),
        dtype=read_dtype(dict(config)),
    )


def _laguna_config(config: ConfigJson, target_layers: int) -> ConfigJson:
    layers = config["transformer_layer_config"]
    rope = layers.get("rope_parameters") or {"rope_type": "default", "rope_theta": layers.get("rope_theta", 1e6)}
    return describe_laguna(
        layers,
        layer_types=read_layer_types(layers),
        layer_ids=[layer - 1 for layer in config["aux_hidden_state_layer_ids"]],
        num_target_layers=target_layers,
        block_size=config["block_size"],
        mask_token_id=config["mask_token_id"],
        causal=not config.get("sliding_window_non_causal", True),
        gated=False,
        rope={"partial_rotary_factor": 1.0, **rope},
        dtype=read_dtype({**config, **layers}),
    )


def _is_constant(weight: torch.Tensor) -> bool:
    return bool((weight == weight[0]).all()) and float(weight[0]) > 0


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)
