"""Speculative decoding configured for people.

Whether a drafter fits its target, how many tokens it may propose, and vLLM's own spelling of it.

For an engine that you start yourself, with plain vLLM:

    from laguna_serve.serving.speculation.drafting import speculative_config
    LLM("poolside/Laguna-XS.2", speculative_config=speculative_config("DRAFTER", "poolside/Laguna-XS.2"))
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from laguna_serve.plugins.layers import SLIDING
from laguna_serve.serving.checkpoint import CheckpointError, Target, find_folder
from laguna_serve.serving.checkpoint.drafter import SPECULATORS, Drafter, read_drafter
from laguna_serve.serving.checkpoint.others import read_served
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.kit.results import JsonObject

HALF_RANGE = ("float16", "half")
# In a drafter's name the form of the model that it was trained for; its own weights are in bf16.
FORM = re.compile(r"[-_.](fp8|nvfp4|int4)(?![a-z0-9])")
# How drafts are chosen where tokens are sampled: the drafter's likeliest token, or one drawn from its distribution,
# which is then accepted with min(1, p/q) (arXiv:2211.17192). Either way the target's distribution comes out.
DRAFT_SAMPLING = ("greedy", "probabilistic")


def speculative_config(
    draft: str, target: str | None = None, gamma: int | Literal["max"] = "max", sampling: str = DRAFT_SAMPLING[0]
) -> JsonObject:
    """vLLM's `speculative_config` for a DFlash drafter in either format.

    Args:
        draft: folder or hub id of the drafter.
        target: of the model that it drafts for; None leaves the fit unchecked.
        gamma: tokens proposed per step, "max" for as many as it was trained for.
        sampling: how drafts for sampled requests are chosen, one of DRAFT_SAMPLING.
    Raises:
        CheckpointError: the drafter cannot be read, does not fit, or was not trained for that many tokens.
    """
    folder = find_folder(draft)
    drafter = open_drafter(folder, draft) if folder is not None else None
    target_folder = find_folder(target) if target is not None else None
    described = read_served(target_folder).target if target_folder is not None else None
    if drafter is not None and described is not None:
        check_fit(described, drafter)
    return format_speculation(draft, resolve_gamma(None if gamma == "max" else gamma, drafter), sampling=sampling)


def format_speculation(
    draft: str, gamma: int, schedule: Sequence[tuple[int, int, int]] | None = None, sampling: str = DRAFT_SAMPLING[0]
) -> JsonObject:
    """vLLM's spelling of a drafter and γ that were checked.

    It has γ by batch size where that differs, and how drafts are sampled.
    """
    config: JsonObject = {"method": "dflash", "model": os.path.expanduser(draft), "num_speculative_tokens": gamma}
    if schedule is not None and any(entry[2] != gamma for entry in schedule):
        config["num_speculative_tokens_per_batch_size"] = [list(entry) for entry in schedule]
    if sampling != DRAFT_SAMPLING[0]:
        config["draft_sample_method"] = sampling
    return config


def open_drafter(folder: Path, name: str) -> Drafter:
    """Read a drafter's config and check its weights, those of a hub id only where they were fetched already."""
    from laguna_serve.serving.checkpoint.stored.drafter_weights import (
        check_weights,  # NumPy: not where nothing is drafted
    )

    drafter = read_drafter(folder)
    if expand(name).is_dir() or next(folder.glob("*.safetensors"), None) is not None:
        check_weights(folder, drafter)
    return drafter


def check_fit(target: Target, drafter: Drafter) -> None:
    """Raise CheckpointError naming the first thing in which the drafter does not fit its target."""
    subject = f"drafter {drafter.name}"
    remedy = f"take a drafter trained for {target.name}"
    for what, expected, got in (
        ("vocabulary", target.vocab_size, drafter.target_vocab_size),
        ("hidden size", target.hidden_size, drafter.target_hidden_size),
    ):
        if expected != got:
            raise CheckpointError(f"{subject}: expected the target's {what} {expected}, got {got}; {remedy}")
    if drafter.format == SPECULATORS:
        if drafter.draft_vocab_size > target.vocab_size:
            limit = f"at most {target.vocab_size} draft tokens"
            raise CheckpointError(f"{subject}: expected {limit}, got {drafter.draft_vocab_size}; {remedy}")
        if drafter.hidden_size != target.hidden_size:
            limit = f"layers as wide as the target's {target.hidden_size}, whose embedding they share"
            raise CheckpointError(f"{subject}: expected {limit}, got {drafter.hidden_size}; {remedy}")
    elif drafter.draft_vocab_size != target.vocab_size:
        limit = f"to draft all of the target's {target.vocab_size} tokens, whose head it shares"
        raise CheckpointError(f"{subject}: expected {limit}, got {drafter.draft_vocab_size}; {remedy}")
    if drafter.target_layers not in (None, target.num_layers):
        layers = f"a target of {drafter.target_layers} layers, as its num_target_layers says"
        raise CheckpointError(f"{subject}: expected {layers}, got {target.num_layers}; {remedy}")
    _check_layer_ids(target, drafter, subject, remedy)
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        limits = f"a mask token from 0 to {target.vocab_size - 1}"
        raise CheckpointError(f"{subject}: expected {limits}, got {drafter.mask_token_id}; {remedy}")


def _check_layer_ids(target: Target, drafter: Drafter, subject: str, remedy: str) -> None:
    first, last = drafter.first_layer_id, target.num_layers + drafter.first_layer_id - 1
    strays = [layer for layer in drafter.layer_ids if not first <= layer <= last]
    limits = f"target layer ids from {first} to {last}"
    if not drafter.layer_ids or strays:
        other = 1 - first
        if strays and all(other <= layer <= target.num_layers + other - 1 for layer in drafter.layer_ids):
            shift = "add 1 to each" if first else "subtract 1 from each"
            remedy = f"these ids count from {other}, this format counts from {first}: {shift} if so it was trained"
        raise CheckpointError(f"{subject}: expected {limits}, got {strays or 'none'}; {remedy}")
    if len(set(drafter.layer_ids)) != len(drafter.layer_ids):
        raise CheckpointError(f"{subject}: expected different {limits}, got {list(drafter.layer_ids)}; {remedy}")


def resolve_gamma(gamma: int | None, drafter: Drafter | None, *, beyond_block: bool = False) -> int:
    """Resolve the number of proposals per step: the given γ if the drafter was trained for it, by default its maximum.

    Beyond block − 1 the drafter sees positions it was never trained on; vLLM would run it without a word, here that
    takes `beyond_block`. For a drafter that is not on this machine (None) γ cannot be checked and must be given.
    """
    if gamma is not None and gamma < 1:
        raise CheckpointError(
            f"gamma: expected at least 1, got {gamma}; leave the draft out to serve without speculation"
        )
    if drafter is None:
        if gamma is None:
            raise CheckpointError(
                "gamma: expected a number for a drafter that is not on this machine, got none; pass it, or fetch it"
            )
        return gamma
    if drafter.max_gamma < 1:
        raise CheckpointError(
            f"drafter {drafter.name}: expected a block of at least 2, got {drafter.block_size}; check it"
        )
    if gamma is not None and gamma > drafter.max_gamma and not beyond_block:
        block = f"block {drafter.block_size} of {drafter.name}"
        raise CheckpointError(f"gamma: expected 1 to {drafter.max_gamma} ({block}), got {gamma}; lower it")
    return gamma or drafter.max_gamma


def list_warnings(
    target: Target, drafter: Drafter, *, dtype: str, max_model_len: int | None, pruned: bool
) -> list[str]:
    """List what works but should be known, a line each.

    `dtype` and `max_model_len` are those asked for ("auto" and None: the target's own); `pruned` says that the
    target's experts are pruned while it is loaded.
    """
    warnings = []
    foreign = _find_other_target(target, drafter, pruned)
    if foreign is not None:
        warnings.append(
            f"drafter {drafter.name}: {foreign}; the output stays {target.name}'s own, and fewer proposals are accepted"
            " than with the model it was trained for"
        )
    other_form = _find_other_form(target, drafter)
    if other_form is not None:
        warnings.append(
            f"drafter {drafter.name}: {other_form}; next to nothing that it proposes may be accepted, and decoding be"
            f" slower than without: take the one that is published for {target.name}, or `laguna drafter train` one"
        )
    wanted = max_model_len or target.max_model_len
    if drafter.max_model_len < wanted:
        beyond = f"was trained for positions up to {drafter.max_model_len}, {wanted} are served"
        warnings.append(f"drafter {drafter.name}: {beyond}; expect few accepted proposals beyond")
    served = target.dtype if dtype == "auto" else dtype
    if served in HALF_RANGE and drafter.dtype not in HALF_RANGE:
        warnings.append(
            f"drafter {drafter.name}: stored as {drafter.dtype}, served as {served} like the target;"
            " its activations may overflow"
        )
    if SLIDING in drafter.attention.layer_types and len(set(drafter.attention.layer_types)) > 1:
        warnings.append(
            f"drafter {drafter.name}: has sliding and full attention, which vLLM serves with its V2 model runner only,"
            " on a GPU"
        )
    return warnings


def _find_other_target(target: Target, drafter: Drafter, pruned: bool) -> str | None:
    """Why the drafter may have been trained for another model; None where nothing says so."""
    if drafter.verifier is not None:
        if _last_part(drafter.verifier) == _last_part(target.name) and not pruned:
            return None
        kind = " with its experts pruned" if pruned else ""
        return f"trained for {drafter.verifier}, drafts for {target.name}{kind}"
    if not target.architecture.startswith("Laguna"):
        return None  # most drafters are for the dense models that these are
    kind = "pruned" if pruned or target.pruned else "dense" if target.dense else ""
    return f"does not say what it was trained for, drafts for a {kind} model" if kind else None


def _find_other_form(target: Target, drafter: Drafter) -> str | None:
    """Why the drafter may have been trained on other hidden states than this form of the model has; None if it fits.

    Some quantised releases have rotated ones (`find_rotation`), and a drafter for each form: its name says for which.
    """
    if drafter.verifier is not None and _last_part(drafter.verifier) == _last_part(target.name):
        return None
    if drafter.target_rotated is not None:
        others = f"was trained on {'rotated' if drafter.target_rotated else 'plain'} hidden states, which these are not"
        return None if drafter.target_rotated == target.rotated else others
    own = target.quantisation.kind if target.quantisation is not None else ""
    found = FORM.search(_last_part(drafter.name))
    form = found[1] if found else ""
    if target.rotated and (form != own if own else not form):
        named = f"named for {form.upper()}" if form else "not named for it"
        return f"is {named}, and the hidden states of {target.name} are rotated, as transform_config of its config says"
    if not target.rotated and form not in ("", own):
        return (
            f"is named for {form.upper()}, whose hidden states may be rotated, and drafts for {own.upper() or 'bf16'}"
        )
    return None


def _last_part(name: str) -> str:
    """Return the last part of a hub id or folder, also of the hub's cache (…/models--org--name/snapshots/revision)."""
    for part in Path(name).parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2].lower()
    return expand(name).resolve().name.lower()
