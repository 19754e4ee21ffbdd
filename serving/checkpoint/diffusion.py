"""A masked diffusion model (LLaDA), as its config.json describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laguna_serve.serving.checkpoint.fields import CheckpointError, Fields, show
from laguna_serve.serving.checkpoint.folder import find_folder, read_config, require_folder
from laguna_serve.serving.checkpoint.target import read_dtype

ARCHITECTURE, MODEL_TYPE = "LLaDAModelLM", "llada"
# What a config means that does not say it, as plugins/diffusion/checkpoint.py has it.
DEFAULT_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """What is known of it before it is loaded.

    Attributes:
        dtype: of the checkpoint, in torch's spelling.
        max_model_len: tokens of prompt and canvas together.
    """

    name: str
    folder: Path
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    rows: int
    tied: bool
    mask_token_id: int
    max_model_len: int
    dtype: str

    @property
    def parameters(self) -> int:
        """How many there are."""
        size = self.hidden_size
        narrow = size * size // self.heads * self.kv_heads
        layer = 2 * size * size + 2 * narrow + 3 * size * self.intermediate_size + 2 * size
        return self.rows * size * (1 if self.tied else 2) + self.layers * layer + size

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of a position in all layers."""
        return 2 * self.layers * (self.hidden_size // self.heads) * self.kv_heads


def find_diffusion(name: str) -> DiffusionModel | None:
    """Read the checkpoint of a name if it is a LLaDA; None for any other, and for a hub id that tells nothing.

    Raises:
        CheckpointError: there is no such checkpoint, or it is a LLaDA that cannot be read.
    """
    folder = find_folder(name)
    if folder is None:
        # The engine reads files alone: a LLaDA that is not here cannot be left to vLLM, which has none.
        return read_diffusion(name, require_folder(name)) if "llada" in name.lower() else None
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if ARCHITECTURE not in (named, None) or config.get("model_type") != MODEL_TYPE:
        other = str(named).lower().startswith("llada") or str(config.get("model_type")).startswith(MODEL_TYPE)
        if other:
            got = f"got {show(named)}"
            raise CheckpointError(f"{name}: expected {ARCHITECTURE}, as LLaDA-8B has, {got}; no other is served here")
        return None
    return read_diffusion(name, folder)


def read_diffusion(name: str, folder: Path) -> DiffusionModel:
    """Read a LLaDA's config.json.

    Raises:
        CheckpointError: a field is missing, or the fields do not go together.
    """
    config = read_config(folder)
    fields = Fields(folder, config)
    size, heads, vocabulary = (fields.positive(key) for key in ("d_model", "n_heads", "vocab_size"))
    kv_heads = fields.positive("n_kv_heads", heads)
    if size % (2 * heads) or heads % kv_heads:
        got = f"d_model {size}, n_heads {heads}, n_kv_heads {kv_heads}"
        raise CheckpointError(f"{folder}: expected heads of one even width, shared evenly, got {got}; fetch it again")
    return DiffusionModel(
        name=name,
        folder=folder,
        layers=fields.positive("n_layers"),
        hidden_size=size,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=fields.positive("mlp_hidden_size"),
        vocab_size=vocabulary,
        rows=fields.positive("embedding_size", vocabulary),
        tied=config.get("weight_tying") is True,
        mask_token_id=fields.integer("mask_token_id"),
        max_model_len=fields.positive("max_sequence_length", DEFAULT_LENGTH),
        dtype=read_dtype(config),
    )
