"""A LLaDA checkpoint: its config.json, and its tensors one at a time, whichever shard they are in.

The keys and the names of tensors are those of GSAI-ML/LLaDA-8B-Instruct. What a config may say there and the model
here has not (biases, ALiBi, norms of queries and keys, …) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from laguna_serve.plugins.diffusion.errors import DiffusionError

# Key → the one value of it that the model has; a config that lacks the key means that value.
ONLY: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
# Of a field, as it is written below → what JSON has for it.
KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
SIZES = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class LladaConfig:
    """The shape of a model, under the names of its config.json.

    Attributes:
        embedding_size: rows of the embedding and of the head, vocab_size or more of them.
        max_sequence_length: tokens of prompt and canvas together.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    mask_token_id: int
    eos_token_id: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 4096
    weight_tying: bool = False

    @property
    def head_size(self) -> int:
        """Width of a head: an even number, as positions turn pairs."""
        return self.d_model // self.n_heads


def read_config(folder: Path) -> LladaConfig:
    """Read the folder's config.json.

    Raises:
        DiffusionError: there is none, it is another model's, or a key is missing or has a value that the model has not.
    """
    path = folder / "config.json"
    keys: dict[str, Any] = _read_keys(path)
    for key, only in ONLY.items():
        if keys.get(key, only) != only:
            raise DiffusionError(f"{path}: expected {key} {only!r}, got {keys[key]!r}; this model is not carried")
    defaults = {"n_kv_heads": keys.get("n_heads"), "embedding_size": keys.get("vocab_size")}
    given = {name: keys[name] for name in LladaConfig.__dataclass_fields__ if keys.get(name) is not None}
    try:
        config = LladaConfig(**{**{k: v for k, v in defaults.items() if v is not None}, **given})
    except TypeError as error:
        missing = str(error).partition(": ")[2]
        raise DiffusionError(f"{path}: expected LLaDA's keys, got none of {missing}; check the file") from None
    _check(path, config)
    return config


def read_stored_dtype(folder: Path) -> str:
    """Read the dtype of the folder's tensors, in torch's spelling; what config.json does not say is bfloat16.

    Raises:
        DiffusionError: there is no config.json, or it is another model's.
    """
    keys = _read_keys(folder / "config.json")
    return str(keys.get("dtype") or keys.get("torch_dtype") or "bfloat16")


def read_object(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises DiffusionError where the file holds none."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DiffusionError(f"{path}: expected a model's configuration, got {error}; check the folder") from None
    if not isinstance(keys, dict):
        raise DiffusionError(f"{path}: expected a model's configuration, got {type(keys).__name__}; check the folder")
    return keys


def _read_keys(path: Path) -> dict[str, object]:
    if not path.exists():
        raise DiffusionError(
            f"{path.parent}: expected a model's configuration, got no config.json in it; check the folder"
        )
    keys = read_object(path)
    if (got := keys.get("model_type")) != "llada":
        raise DiffusionError(f'{path}: expected "model_type": "llada", got {got!r}; choose a LLaDA checkpoint')
    return keys


def _check(path: Path, config: LladaConfig) -> None:
    for field in fields(config):
        value, allowed = getattr(config, field.name), KINDS[str(field.type)]
        if type(value) not in allowed or (field.name in SIZES and value < 1):
            expected = f"a {'positive ' if field.name in SIZES else ''}{field.type}"
            raise DiffusionError(f"{path}: expected {field.name} to be {expected}, got {value!r}; fetch it again")
    if config.d_model % (2 * config.n_heads) or config.n_heads % config.n_kv_heads:
        got = f"d_model {config.d_model}, n_heads {config.n_heads}, n_kv_heads {config.n_kv_heads}"
        raise DiffusionError(f"{path}: expected heads of one even width, shared evenly, got {got}; check the file")
    if config.embedding_size < config.vocab_size or not 0 <= config.mask_token_id < config.vocab_size:
        got = f"{config.embedding_size} rows, {config.vocab_size} tokens, mask {config.mask_token_id}"
        raise DiffusionError(f"{path}: expected an embedding with the mask in it, got {got}; check the file")


class Tensors:
    """A folder's tensors by name, read when asked for; close it, or use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        """Open every shard.

        Raises:
            DiffusionError: there is no safetensors file, or one that cannot be read.
        """
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                self.close()
                raise DiffusionError(
                    f"{path}: expected a whole safetensors file, got {error}; fetch it again"
                ) from None
            self._where |= dict.fromkeys(file.keys(), file)
        if not self._where:
            raise DiffusionError(f"{folder}: expected weights (*.safetensors), got none; fetch them")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def close(self) -> None:
        """Close the files; tensors that were read stay."""
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor [shape] in `dtype`.

        Raises:
            DiffusionError: it is not there, or of another shape.
        """
        if name not in self._where:
            raise DiffusionError(f"{self.folder}: expected the tensor {name}, got none; is it a whole LLaDA?")
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise DiffusionError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}; check config.json")
        return tensor.to(dtype)
