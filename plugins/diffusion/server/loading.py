"""Loads what is served: target, draft and tokenizer, put together as a decoder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.checkpoint import LladaConfig, read_config, read_object, read_stored_dtype
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Cache, Evenly, PerStep, Reference, Schedule, Threshold
from laguna_serve.plugins.diffusion.engine.room import count_token_bytes, find_logit_room, find_room
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.low_precision import quantise
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.interface import Proposer
from laguna_serve.plugins.diffusion.proposing.prepared import find_cost, load_proposers
from laguna_serve.plugins.diffusion.proposing.shapes import Chain, Sequential
from laguna_serve.plugins.diffusion.proposing.sources import Corrected, Drafted, Stale
from laguna_serve.plugins.diffusion.server.options import PROPOSERS, ServerOptions
from laguna_serve.plugins.diffusion.server.texts import Texts
from laguna_serve.plugins.diffusion.speculation import Decoder, Speculation
from laguna_serve.plugins.diffusion.trial import try_speculation

# What ends a turn of LLaDA's chats; config.json names the end of a text alone.
END_OF_TURN = "<|eot_id|>"
TRIAL_S = 6.0
TRIAL_TEXTS = ("def fibonacci(n):\n", "Once upon a time", "Question: How many hours has a week?\nAnswer:")
DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is ready.

    Attributes:
        stop: ids that end an answer.
        max_model_len: tokens of prompt and canvas together.
        vocab_size: ids are below it.
        room: tokens of all requests that share passes; None: as many as there are.
        open_room: positions of the blocks that are open in a pass, whose logits need room; None: as many.
    """

    decoder: Decoder
    texts: Texts
    stop: frozenset[int]
    mask_id: int
    max_model_len: int
    vocab_size: int
    room: int | None = None
    open_room: int | None = None


def load(options: ServerOptions) -> Served:
    """Load everything that the options name.

    Raises:
        DiffusionError: something of it cannot be used.
    """
    folder = Path(options.model)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    texts = Texts(load_tokenizer(folder))
    target = load_model(folder, choose_dtype(options.dtype, folder, device), device)
    config = target.config
    if options.max_model_len is not None and options.max_model_len > config.max_sequence_length:
        most = f"at most {config.max_sequence_length}, the model's own"
        raise DiffusionError(f"--max-model-len: expected {most}, got {options.max_model_len}; lower it")
    options.check_block(config.max_sequence_length)
    reference = make_reference(options)
    speculation = draft = None
    if options.proposed_states:
        draft = None if options.draft is None else load_draft(Path(options.draft), target, options.draft_weights)
        proposer = make_proposer(options, reference, target, draft)
        speculation = Speculation(proposer, options.proposed_states, options.rows)
    predictor = Predictor(target)
    if speculation is not None and options.draft_policy == "auto":
        canvases = make_trial_canvases(texts, options, config)
        logger.info("Trying whether proposals pay")
        trial = try_speculation(predictor, reference, speculation, canvases, TRIAL_S)
        left_out = "" if trial.pays else "; left out as they lose here, --draft-policy always keeps them"
        logger.info("Proposals (%s): %s%s", options.chosen_proposer, trial, left_out)
        if not trial.pays:
            speculation = draft = None
            del proposer  # its weights make room for others
    decoder = Decoder(predictor, reference, (), speculation, keeps=speculation is not None)
    models = [target, *([] if draft is None else [draft])]
    device_used = target.embedding.weight.device
    room = find_room(count_token_bytes(reference, *models), device_used)
    open_room = find_logit_room(reference, config.vocab_size, len(models), device_used)
    return Served(
        decoder=decoder,
        texts=texts,
        stop=find_stop(folder, texts, config.eos_token_id),
        mask_id=config.mask_token_id,
        max_model_len=options.max_model_len or config.max_sequence_length,
        vocab_size=config.vocab_size,
        room=room and (options.max_cached_tokens or room),
        open_room=max(open_room, options.block_length),
    )


def make_trial_canvases(texts: Texts, options: ServerOptions, config: LladaConfig) -> list[Canvas]:
    """Make what proposals are tried on; nobody sees the answers."""
    blocks = max(1, min(options.canvas_length, config.max_sequence_length // 2) // options.block_length)
    prompts = [[id_ for id_ in texts.encode(text) if id_ != config.mask_token_id] for text in TRIAL_TEXTS]
    canvas = options.block_length * blocks
    return [Canvas(tuple(ids), canvas, options.block_length, config.mask_token_id) for ids in prompts]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder; none of its code is run.

    Raises:
        DiffusionError: there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise DiffusionError(f"{folder}: expected a tokenizer (tokenizer.json), got none; fetch it")
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def choose_dtype(name: str, folder: Path, device: str) -> torch.dtype:
    """Choose the weights' dtype: as asked, else the checkpoint's on a GPU and float32 on a CPU.

    Raises:
        DiffusionError: the folder has no configuration of a LLaDA.
    """
    if name != "auto":
        return DTYPES[name]
    stored = read_stored_dtype(folder)
    return torch.float32 if device == "cpu" else DTYPES.get(stored, torch.bfloat16)


def make_schedule(tokens_per_step: int | None, steps_per_block: int | None, threshold: float | None) -> Schedule:
    """Make the schedule of which one is given; of none, a token a step."""
    if threshold is not None:
        return Threshold(threshold)
    return PerStep(tokens_per_step or 1) if steps_per_block is None else Evenly(steps_per_block)


def make_reference(options: ServerOptions) -> Reference:
    """Make the reference of requests that choose nothing."""
    return Reference(
        make_schedule(options.tokens_per_step, options.steps_per_block, options.threshold),
        guidance=options.guidance,
        cache=cast(Cache, options.cache),
    )


def make_proposer(options: ServerOptions, reference: Reference, target: Llada, draft: Llada | None) -> Proposer:
    """Make what proposes states.

    Raises:
        DiffusionError: a file cannot be used.
    """
    chosen = options.chosen_proposer
    if options.proposals is not None:
        return load_proposers(Path(options.proposals), target, draft, reference)[PROPOSERS[chosen][0]]
    if draft is None or chosen == "chain":
        return Chain(Stale())
    drafted = Drafted(Predictor(draft, reference.cache, reference.guidance))
    if chosen == "sequential":
        return Sequential(drafted, find_cost(target, draft))
    return Chain(drafted if chosen == "draft" else Corrected(drafted))


def load_draft(folder: Path, target: Llada, draft_weights: str) -> Llada:
    """Load the draft on the target's device, in its dtype but for the matrices that are to have fewer bits.

    Raises:
        DiffusionError: it does not fit the target, or cannot be stored so.
    """
    weights = target.embedding.weight
    config = read_config(folder)
    for name in ("vocab_size", "mask_token_id"):
        expected, got = getattr(target.config, name), getattr(config, name)
        if expected != got:
            raise DiffusionError(f"{folder}: expected {name} {expected}, as the target has, got {got}; choose another")
    if config.max_sequence_length < target.config.max_sequence_length:
        expected = f"expected max_sequence_length {target.config.max_sequence_length}, as the target has, or more"
        raise DiffusionError(f"{folder}: {expected}, got {config.max_sequence_length}; choose another")
    draft = load_model(folder, weights.dtype, str(weights.device))
    quantise(draft, draft_weights)
    return draft


def find_stop(folder: Path, texts: Texts, eos: int) -> frozenset[int]:
    """Find the ids that end an answer: config.json's, the tokenizer's, generation_config.json's, the end of a turn.

    Raises:
        DiffusionError: generation_config.json names something else.
    """
    found = {eos, *texts.find_ids(END_OF_TURN), *texts.end_ids}
    path = folder / "generation_config.json"
    if path.is_file():
        named = read_object(path).get("eos_token_id")
        ends = named if isinstance(named, list) else [] if named is None else [named]
        ids = [id_ for id_ in ends if isinstance(id_, int)]
        if len(ids) < len(ends):
            raise DiffusionError(f"{path}: expected eos_token_id to be token ids, got {named!r}; correct it")
        found |= set(ids)
    return frozenset(found)
