"""Reads and checks what an engine's configuration names, before a start: model, drafter, γ, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laguna_serve.serving.chat.release import assume_release, read_release
from laguna_serve.serving.chat.vendor_defaults import NO_CONTRACT, ChatContract, choose_chat_flags, find_value
from laguna_serve.serving.checkpoint import (
    CheckpointError,
    ConfigJson,
    Target,
    check_pruning_files,
    find_folder,
    read_config,
    read_target,
)
from laguna_serve.serving.checkpoint.drafter import Drafter, read_drafter
from laguna_serve.serving.checkpoint.parameters import estimate_bytes, estimate_drafter_bytes
from laguna_serve.serving.checkpoint.weight_files import measure_weights
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.support import check_use
from laguna_serve.serving.speculation.drafting import (
    DRAFT_SAMPLING,
    check_fit,
    list_warnings,
    open_drafter,
    resolve_gamma,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What is known of a configuration's checkpoints.

    ``target`` and ``drafter`` are None for hub ids that are not on this machine; ``gamma`` is None without a draft.
    ``warnings`` are for people, a line each.  ``configs`` are the config.json files that are on this machine.
    """

    target: Target | None
    drafter: Drafter | None
    gamma: int | None
    weight_bytes: int
    local: bool
    warnings: tuple[str, ...] = ()
    chat: ChatContract = NO_CONTRACT
    configs: tuple[ConfigJson, ...] = ()


def inspect(config: EngineConfig, *, weights: bool = True) -> Checkpoints:
    """Read and check target, drafter and γ.  Raises CheckpointError with one line.

    ``weights`` is False for a plan, which needs no more of a drafter than its config.json.
    """
    if config.gamma is not None and config.draft is None:
        raise CheckpointError(
            f"gamma: expected a draft beside it, got {config.gamma} alone; name the drafter or drop gamma"
        )
    if config.draft_sampling not in DRAFT_SAMPLING:
        got = f"got {config.draft_sampling!r}; choose one"
        raise CheckpointError(f"draft sampling: expected {' or '.join(DRAFT_SAMPLING)}, {got}")
    if config.draft_sampling != DRAFT_SAMPLING[0] and config.draft is None:
        remedy = "name the drafter or drop it"
        raise CheckpointError(
            f"draft sampling: expected a draft beside it, got {config.draft_sampling} alone; {remedy}"
        )
    if config.weight_updates and config.host not in LOOPBACK:
        remedy = "put the gateway in front of it"
        raise CheckpointError(f"weight updates: expected an engine on the loopback, got {config.host}; {remedy}")
    check_pruning_files(config.keep_mask, config.group_indices)
    target_folder = find_folder(config.model)
    target = read_target(target_folder) if target_folder is not None else None
    draft_folder = find_folder(config.draft) if config.draft is not None else None
    drafter = None
    if draft_folder is not None:
        drafter = open_drafter(draft_folder, config.draft or "") if weights else read_drafter(draft_folder)
    if target is not None:
        check_use(target, config.keep_mask)
    warnings: list[str] = []
    if target is not None and drafter is not None:
        check_fit(target, drafter)
        warnings = list_warnings(
            target,
            drafter,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            pruned=config.keep_mask is not None,
        )
    folders = [folder for folder in (target_folder, draft_folder) if folder is not None]
    return Checkpoints(
        target=target,
        drafter=drafter,
        gamma=resolve_gamma(config.gamma, drafter, beyond_block=config.beyond_block)
        if config.draft is not None
        else None,
        weight_bytes=_weigh(target, drafter, target_folder, draft_folder),
        local=all(Path(name).expanduser().is_dir() for name in (config.model, config.draft) if name is not None),
        warnings=tuple(warnings),
        chat=choose_chat(config, target_folder),
        configs=tuple(read_config(folder) for folder in folders),
    )


def _weigh(
    target: Target | None, drafter: Drafter | None, target_folder: Path | None, draft_folder: Path | None
) -> int:
    """Bytes of the weights: of those that are here, else of those that config.json describes."""
    size = 0
    if target is not None and target_folder is not None:
        size += measure_weights(target_folder) or estimate_bytes(target)
    if drafter is not None and draft_folder is not None:
        size += measure_weights(draft_folder) or estimate_drafter_bytes(drafter)
    return size


def choose_chat(config: EngineConfig, folder: Path | None) -> ChatContract:
    """Choose the chat flags for a model in a folder, or for a hub id that is not on this machine."""
    if config.chat is None:
        return NO_CONTRACT
    tokenizer = find_folder(find_value(config.extra_args, "--tokenizer") or config.model)
    if folder is None or tokenizer is None:
        release = assume_release(config.model)
    else:
        release = read_release(folder, tokenizer, find_value(config.extra_args, "--chat-template"))
    return choose_chat_flags(release, config.chat, config.extra_args)
