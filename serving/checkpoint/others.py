"""Models that are not Laguna and are served all the same: whatever vLLM generates text with.

Those of well-known classes in Llama's shape are described by the same `Target`, so that memory, context and devices are
planned as for Laguna; of all others, and of quantised weights, vLLM finds out when it starts. What is Laguna's alone
is refused for them: pruned experts, new weights while serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.plugins.layers import DENSE, FULL, SLIDING, SPARSE
from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, Fields
from laguna_serve.serving.checkpoint.folder import read_config
from laguna_serve.serving.checkpoint.target import Target, is_drafter, read_architectures, read_dtype, read_target

# How classes of transformers are named that generate no text.
NOT_GENERATING = ("Classification", "MaskedLM", "QuestionAnswering", "RewardModel", "EmbeddingModel", "BertModel")
SERVED_BY = "vLLM's own, or its Transformers backend"
# Classes whose config.json is known to say what they take, and the roots of those whose embedding is the output matrix
# where it does not say (transformers 5.19).
PLANNED = frozenset(
    f"{root}ForCausalLM"
    for root in (
        *("Llama", "Mistral", "Mixtral", "Phi3", "Granite", "SmolLM3", "Gemma2", "Gemma3"),
        *("Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Olmo2", "Olmo3", "Olmoe", "Glm4Moe"),
    )
)
TIED = ("SmolLM3", "Gemma")
# Small models of these, with random weights, gave transformers' greedy tokens in vLLM 0.32 on a CPU
# (tests/serving/service/test_others_vllm.py, tests/scripts/dante/test_dante_served.py).
COMPARED = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Where quantisation is described: in config.json, and ModelOpt's in a file of its own.
QUANTISED_KEYS, QUANTISED_FILE = ("quantization_config", "compression_config"), "hf_quant_config.json"
# Kinds of RoPE by which vLLM lengthens max_position_embeddings.
LENGTHENING = ("linear", "dynamic", "yarn")


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is to be served.

    Attributes:
        target: None where what it takes is not planned, for the reason `unplanned`.
        other: the class (without one, the model_type) of one that is no Laguna, else None.
    """

    target: Target | None
    other: str | None = None
    unplanned: str = ""

    def check(self, name: str, asked: Mapping[str, bool]) -> list[str]:
        """Return what is to be said of a model that is no Laguna, a line each; nothing of a Laguna.

        Args:
            name: the model, for messages.
            asked: of what only Laguna has, which is asked for.

        Raises:
            CheckpointError: some of it is.
        """
        if self.other is None:
            return []
        for what, wanted in asked.items():
            if wanted:
                raise CheckpointError(f"{name}: expected a Laguna for {what}, got {self.other}; drop it")
        planned = f"are not planned ({self.unplanned})" if self.unplanned else "are planned from config.json"
        if self.other in COMPARED:
            answers = "compared with transformers' on small random models of this class alone"
        else:
            answers = "never compared here"
        return [
            f"{self.other} is no Laguna: its class is {SERVED_BY}; memory and context {planned},"
            f" answers were {answers} (docs/serve.md#other-models)"
        ]


def read_served(folder: Path) -> Served:
    """Read and check the config of a model that is to be served: a Laguna, or another that generates text.

    Raises:
        CheckpointError: it is neither, or its config is not what it should be.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if is_drafter(config) or kind == "laguna":
        return Served(read_target(folder))
    names = read_architectures(folder, config)
    if not names and isinstance(kind, str) and kind.isprintable():
        return Served(None, kind, "config.json names no class")
    if not names or names[0].startswith("Laguna"):
        return Served(read_target(folder))
    if names[0].endswith(NOT_GENERATING):
        raise CheckpointError(f"{folder}: expected a model that generates text, got {names[0]}; start it with vLLM")
    unplanned = _find_unplanned(folder, config, names[0])
    return Served(None if unplanned else _describe(Fields(folder, config), names[0]), names[0], unplanned)


def _find_unplanned(folder: Path, config: ConfigJson, architecture: str) -> str:
    """Find why a plan would be wrong, or might be; empty where it would not."""
    if any(config.get(key) is not None for key in QUANTISED_KEYS) or (folder / QUANTISED_FILE).exists():
        return "its weights are quantised"
    if architecture not in PLANNED:
        return "it is of no class that plans were compared for"
    slides = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    kinds = config.get("layer_types")
    if slides and not isinstance(kinds, list):
        return "config.json does not say which layers have a window"
    if isinstance(kinds, list) and not {*map(str, kinds)} <= {FULL, SLIDING}:
        return "its layers are of other kinds"
    ropes = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    if any(isinstance(rope, dict) and {rope.get("type"), rope.get("rope_type")} & {*LENGTHENING} for rope in ropes):
        return "its context is lengthened by its positions"
    if read_dtype(config) not in ("bfloat16", "float16", "float32"):
        return f"its weights are stored in {read_dtype(config)}"
    return ""


def _describe(fields: Fields, architecture: str) -> Target:
    config = fields.config
    layers, heads = fields.layers(), fields.positive("num_attention_heads")
    hidden, inner = fields.positive("hidden_size"), fields.positive("intermediate_size")
    attention = fields.kinds("layer_types", layers, (FULL, SLIDING)) or (FULL,) * layers
    experts = next((fields.integer(key) for key in EXPERT_COUNTS if key in config), 0)
    expert_size = fields.positive("moe_intermediate_size", inner)
    shared = fields.integer("shared_expert_intermediate_size", fields.integer("n_shared_experts", 0) * expert_size)
    return Target(
        name=str(fields.folder),
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        max_model_len=fields.positive("max_position_embeddings"),
        dtype=read_dtype(config),
        num_experts=experts,
        experts_per_token=fields.positive("num_experts_per_tok", 1) if experts else 0,
        expert_size=expert_size if experts else 0,
        shared_expert_size=shared if experts else 0,
        mlp_kinds=tuple(_find_kinds(fields, layers)) if experts else (DENSE,) * layers,
        attention_kinds=attention,
        heads=(heads,) * layers,
        num_kv_heads=fields.positive("num_key_value_heads", heads),
        head_dim=fields.positive("head_dim", max(1, hidden // heads)),
        gate_width=0,
        sliding_window=fields.positive("sliding_window") if SLIDING in attention else None,
        tied=bool(config.get("tie_word_embeddings", architecture.startswith(TIED))),
        quantisation=None,
        overrides={},
    )


def _find_kinds(fields: Fields, layers: int) -> list[str]:
    """Find which layers of a mixture have experts, by the keys of Qwen's and GLM's."""
    first, every = fields.integer("first_k_dense_replace", 0), fields.positive("decoder_sparse_step", 1)
    dense = {*fields.integers("mlp_only_layers")} if "mlp_only_layers" in fields.config else set()
    return [DENSE if layer < first or layer in dense or (layer + 1) % every else SPARSE for layer in range(layers)]
