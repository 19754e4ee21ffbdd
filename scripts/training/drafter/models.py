"""The drafter that is trained: a new one of a chosen shape, or one that is continued; and its checkpoint.

Of a drafter that is continued config.json stays as it is, so that what a published one says of itself is kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from laguna_serve.plugins.formats.sequential_head import HEAD, describe_rank
from laguna_serve.plugins.layers import DENSE, SPARSE, resolve_layer_kinds
from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter
from laguna_serve.scripts.checkpoints.drafters.layout import read_rope
from laguna_serve.scripts.checkpoints.drafters.shape import DrafterShape
from laguna_serve.scripts.checkpoints.drafters.speculators import SpeculatorsDrafter, choose_vocabulary, start_head
from laguna_serve.scripts.checkpoints.output import check_space, write_file, write_tensors
from laguna_serve.scripts.training.drafter.config import NewDrafter
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson, Target, read_config, read_dtype
from laguna_serve.serving.checkpoint.drafter import LAGUNA, ORIGINAL, SPECULATORS, TARGET_ROTATED, Drafter
from laguna_serve.serving.checkpoint.quantisation import find_rotation
from laguna_serve.serving.speculation.drafting import check_fit, open_drafter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENIZER_FILES = ("tokenizer*.json", "*.jinja", "special_tokens_map.json")
MOST_TAPS, MOST_LAYERS = 5, 5
MOST_DRAFTED = 32_000


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A drafter in fp32, and the config.json that it is served with."""

    module: LagunaDrafter
    config: ConfigJson

    @property
    def parameters(self) -> int:
        """Trained ones, without what is the target's."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def choose_shape(target: Target, new: NewDrafter, mask_token: int | None) -> DrafterShape:
    """Choose a new drafter's shape; `mask_token`: the tokenizer's, where it has one.

    Raises:
        CheckpointError: taps or mask token that the target does not have, or a reduced vocabulary in Laguna's format.
    """
    count, H = target.num_layers, target.hidden_size
    mask = mask_token if new.mask_token is None else new.mask_token
    if mask is None:
        expected = "a token that is never written, as the tokenizer has no mask token"
        raise CheckpointError(f"--mask-token: expected {expected}, got none; name a reserved one")
    if not 0 <= mask < target.vocab_size:
        raise CheckpointError(f"--mask-token: expected 0 to {target.vocab_size - 1}, got {mask}; name another")
    taps = choose_taps(count) if new.taps is None else new.taps
    if len(set(taps)) != len(taps) or not all(0 <= tap < count for tap in taps):
        expected = f"different layers of the target, 0 to {count - 1}"
        raise CheckpointError(f"--taps: expected {expected}, got {', '.join(map(str, taps))}; correct them")
    heads = target.heads[0] if new.heads is None else new.heads
    if heads % target.num_kv_heads:
        expected = f"a multiple of the target's {target.num_kv_heads} key-value heads"
        raise CheckpointError(f"--heads: expected {expected}, got {heads}; change it")
    return DrafterShape(
        vocab_size=target.vocab_size,
        hidden_size=H,
        target_layer_ids=tuple(taps),
        mask_token_id=mask,
        num_target_layers=count,
        num_hidden_layers=new.layers or max(1, min(MOST_LAYERS, count // 3)),
        num_attention_heads=heads,
        num_key_value_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=new.width or 4 * H,
        block_size=new.block_size,
        partial_rotary_factor=0.5 if new.format == LAGUNA else 1.0,
        head_rank=new.head_rank,
    )


def choose_taps(layers: int) -> tuple[int, ...]:
    """Choose up to five layers, evenly spaced from the second to the last."""
    count = min(MOST_TAPS, layers)
    first = 1 if layers > count else 0
    return tuple(round(first + i * (layers - 1 - first) / max(1, count - 1)) for i in range(count))


def make_drafter(
    shape: DrafterShape, new: NewDrafter, target: Target, head: torch.Tensor, answers: torch.Tensor, seed: int
) -> Made:
    """Make a new drafter with random weights; of a reduced vocabulary the tokens that are most frequent in `answers`.

    head [V, H] is the target's, whose rows a head of its own begins with.
    """
    torch.manual_seed(seed)
    positions = {"max_position_embeddings": target.max_model_len}
    if new.format == LAGUNA:
        return Made(LagunaDrafter(shape), shape.config() | positions)
    size = min(MOST_DRAFTED if new.draft_vocab is None else new.draft_vocab, shape.vocab_size)
    drafter = SpeculatorsDrafter(shape, choose_vocabulary(answers, size, shape.vocab_size))
    start_head(drafter, head.to("cpu", torch.float32))
    config = drafter.config(Path(target.name).resolve().name)
    config["speculators_config"]["verifier"]["architectures"] = [target.architecture]
    layers = config["transformer_layer_config"] | positions
    return Made(drafter, config | {"transformer_layer_config": layers})


def count_parameters(shape: DrafterShape, new: NewDrafter) -> int:
    """Count what a new drafter would have, without making it."""
    with torch.device("meta"):
        if new.format == LAGUNA:
            return Made(LagunaDrafter(shape), {}).parameters
        size = min(MOST_DRAFTED if new.draft_vocab is None else new.draft_vocab, shape.vocab_size)
        return Made(SpeculatorsDrafter(shape, torch.arange(size)), {}).parameters


def read_warm(folder: Path, target: Target, head_rank: int | None = None) -> Drafter:
    """Read the config of a drafter that is to be continued; `head_rank`: of the sequential head that it is to have.

    Raises:
        CheckpointError: it does not fit the target, has parts that cannot be trained here, or cannot have the head.
    """
    drafter = open_drafter(folder, str(folder))
    check_fit(target, drafter)
    if drafter.format == ORIGINAL:
        raise CheckpointError(
            f"{folder}: expected Laguna's format or speculators', got DFlash's own, which is only served; start anew"
        )
    if head_rank is not None and drafter.format != LAGUNA:
        raise CheckpointError(f"{folder}: expected Laguna's format for a {HEAD}, got {drafter.format}; leave it out")
    if head_rank is not None and drafter.head_rank not in (None, head_rank):
        got = f"one of rank {drafter.head_rank}"
        raise CheckpointError(f"{folder}: expected no {HEAD}, or one of rank {head_rank}, got {got}; leave it out")
    for what in _list_untrainable(read_config(folder), drafter):
        raise CheckpointError(f"{folder}: expected a drafter that can be trained on, got one with {what}; start anew")
    return drafter


def _list_untrainable(config: ConfigJson, drafter: Drafter) -> list[str]:
    layers = config if drafter.format == LAGUNA else config["transformer_layer_config"]
    rope = read_rope(config) if drafter.format == LAGUNA else layers.get("rope_parameters") or {}
    attention = drafter.attention
    found = {
        f"weights in {drafter.quantisation.name}" if drafter.quantisation else "": drafter.quantisation is not None,
        f"{rope.get('rope_type')} rotary embeddings": rope.get("rope_type", "default") != "default",
        "attention biases": attention.bias,
        "a gate per element": attention.gate > 1,
        "heads that differ between layers": len(set(attention.heads)) > 1,
        "sliding and full attention": len(set(attention.layer_types)) > 1,
        "experts": drafter.format == LAGUNA and SPARSE in _read_kinds(config),
    }
    return [what for what, is_there in found.items() if is_there]


def _read_kinds(config: ConfigJson) -> list[str]:
    return [DENSE] if not config.get("num_experts", 0) else resolve_layer_kinds(config)


def load_warm(folder: Path, drafter: Drafter, head_rank: int | None = None, seed: int = 0) -> Made:
    """Load the drafter that `read_warm` has read, fp32; a head that it has not yet is without effect."""
    kind = SpeculatorsDrafter if drafter.format == SPECULATORS else LagunaDrafter
    module, config = kind.load(folder), read_config(folder)
    if head_rank is None or drafter.head_rank is not None:
        return Made(module, config)
    torch.manual_seed(seed)
    module.add_head(head_rank)
    return Made(module, config | {"dflash_config": config["dflash_config"] | describe_rank(head_rank)})


def list_taps(drafter: Drafter) -> tuple[int, ...]:
    """List the tapped layers of a drafter's config, counted from 0."""
    return tuple(layer - drafter.first_layer_id for layer in drafter.layer_ids)


def write_drafter(made: Made, target_folder: Path, out: Path) -> None:
    """Write weights, the target's tokenizer, and config.json last: a folder with one is a whole drafter.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    tensors = made.module.list_tensors(DTYPES.get(read_dtype(made.config), torch.bfloat16))
    check_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: expected to create it, got {error.strerror}; choose another") from None
    write_tensors(out / "model.safetensors", tensors)
    for pattern in TOKENIZER_FILES:
        for path in sorted(target_folder.glob(pattern)):
            write_file(out / path.name, lambda partial, path=path: shutil.copyfile(path, partial))  # type: ignore[misc]
    config = {key: value for key, value in made.config.items() if key != TARGET_ROTATED}
    if find_rotation(read_config(target_folder)) is not None:  # else it would be taken for a drafter of another form
        config[TARGET_ROTATED] = True
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    write_file(out / "config.json", lambda partial: partial.write_text(text, encoding="utf-8"))
