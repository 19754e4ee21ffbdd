"""Reads and checks what an engine's configuration names, before a start: model, drafter, γ, chat template."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from laguna_serve.plugins.formats.experts import FP8, PLAIN, StoredExperts
from laguna_serve.plugins.layers import SPARSE
from laguna_serve.serving.chat.generation import check_generation
from laguna_serve.serving.chat.release import assume_release, read_release
from laguna_serve.serving.chat.vendor_defaults import (
    NO_CONTRACT,
    ChatContract,
    choose_chat_flags,
)
from laguna_serve.serving.checkpoint import (
    CheckpointError,
    ConfigJson,
    Target,
    check_pruning_files,
    find_folder,
    read_config,
)
from laguna_serve.serving.checkpoint.drafter import Drafter, read_drafter
from laguna_serve.serving.checkpoint.others import Served, read_served
from laguna_serve.serving.checkpoint.parameters import estimate_drafter_bytes, estimate_held
from laguna_serve.serving.checkpoint.stored.weight_files import measure_weights
from laguna_serve.serving.kit.files import expand, load_array
from laguna_serve.serving.kit.flags.vllm import find_value, names_flag
from laguna_serve.serving.machine.local_http import LOOPBACK
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.support import check_use, describe_kind
from laguna_serve.serving.speculation.adaptive import DATA_PARALLEL, PIPELINE, TENSOR_PARALLEL, find_several
from laguna_serve.serving.speculation.drafting import (
    DRAFT_SAMPLING,
    check_fit,
    list_warnings,
    open_drafter,
    resolve_gamma,
)

# Kinds of rope whose config says the extended length itself (vllm/config/model.py).
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What is known of a configuration's checkpoints.

    Attributes:
        target, drafter: None for hub ids that are not on this machine.
        gamma: None without a draft.
        target_bytes, drafter_bytes: of their weights as stored.
        local: model and drafter are folders here.
        warnings: for people, a line each.
        configs: the config.json files that are on this machine.
        other: the class of a model that is no Laguna.
        unplanned: why there is no `target` though the model is here.
    """

    target: Target | None
    drafter: Drafter | None
    gamma: int | None
    target_bytes: int
    drafter_bytes: int
    local: bool
    warnings: tuple[str, ...] = ()
    chat: ChatContract = NO_CONTRACT
    configs: tuple[ConfigJson, ...] = ()
    other: str | None = None
    unplanned: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of both, as they are stored."""
        return self.target_bytes + self.drafter_bytes


def inspect(config: EngineConfig, *, weights: bool = True) -> Checkpoints:
    """Read and check target, drafter and γ. Raises CheckpointError with one line.

    `weights` is False for a plan, which needs no more of a drafter than its config.json.
    """
    _check_config(config)
    check_pruning_files(config.keep_mask, config.group_indices)
    target_folder = find_folder(config.model)
    served = read_served(target_folder) if target_folder is not None else Served(None)
    warnings = _check_served(config, served)
    _check_generation(config, target_folder)
    draft_folder = find_folder(config.draft) if config.draft is not None else None
    drafter = _read_drafter(config, draft_folder, weights=weights)
    target = served.target
    if target is not None and target_folder is not None:
        target = _check_target(config, target, read_config(target_folder))
    if target is not None and drafter is not None:
        check_fit(target, drafter)
        warnings += _list_warnings(config, target, drafter)
    if config.gamma_schedule is not None and find_several(config.extra_args, DATA_PARALLEL):
        warnings.append(
            f"--gamma auto: vLLM drops its schedule beside data parallelism, and drafts {config.gamma} tokens at every"
            " batch size; several engines behind the gateway keep it"
        )
    folders = [folder for folder in (target_folder, draft_folder) if folder is not None]
    gamma = None if config.draft is None else resolve_gamma(config.gamma, drafter, beyond_block=config.beyond_block)
    return Checkpoints(
        target=target,
        drafter=drafter,
        gamma=gamma,
        target_bytes=0 if target_folder is None else _weigh(target, target_folder),
        drafter_bytes=0 if drafter is None or draft_folder is None else _weigh_drafter(drafter, draft_folder),
        local=all(expand(name).is_dir() for name in (config.model, config.draft) if name is not None),
        warnings=tuple(warnings),
        chat=choose_chat(config, target_folder),
        configs=tuple(read_config(folder) for folder in folders),
        other=served.other,
        unplanned=served.unplanned,
    )


def _check_config(config: EngineConfig) -> None:
    """Refuse what does not go together, whatever the checkpoints are. Raises CheckpointError."""
    if config.gamma is not None and config.draft is None:
        raise CheckpointError(
            f"gamma: expected a draft beside it, got {config.gamma} alone; name the drafter or drop gamma"
        )
    if config.adaptive and (config.draft is None or config.gamma_schedule is not None):
        got = "no draft" if config.draft is None else "a schedule of γ"
        raise CheckpointError(f"--gamma adaptive: expected a drafter and nothing else that decides, got {got}")
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


def _check_served(config: EngineConfig, served: Served) -> list[str]:
    """Check a model that is no Laguna for what is asked of it; returns warnings. Raises CheckpointError."""
    asked = {
        "a keep mask": config.keep_mask is not None,
        "weight updates": config.weight_updates,
        "--return-routed-experts": config.return_routed_experts,
    }
    warnings = served.check(config.model, asked)
    if config.draft is not None and served.unplanned:
        warnings.append(f"{config.draft}: not checked whether it fits {served.other}, as {served.unplanned}")
    return warnings


def _read_drafter(config: EngineConfig, folder: Path | None, *, weights: bool) -> Drafter | None:
    """Read the drafter, with its weights' headers or without; None of one that is not on this machine."""
    if folder is None:
        return None
    return open_drafter(folder, config.draft or "") if weights else read_drafter(folder)


def _check_target(config: EngineConfig, target: Target, fields: ConfigJson) -> Target:
    """Check the target for what is asked of it; returns it with what a mask keeps. Raises CheckpointError."""
    check_use(config.model, fields, config.keep_mask)
    _check_length(config, target, fields)
    _check_updates(config, target)
    _check_experts(config, target)
    return mark_pruned(target, config.keep_mask)


def _list_warnings(config: EngineConfig, target: Target, drafter: Drafter) -> list[str]:
    return list_warnings(
        target,
        drafter,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        pruned=config.keep_mask is not None,
    )


def _check_generation(config: EngineConfig, folder: Path | None) -> None:
    """Check the generation_config.json that vLLM reads; with --generation-config vllm it takes the ends alone."""
    source = find_value(config.extra_args, "--generation-config") or "auto"
    if source not in ("auto", "vllm"):
        folder = expand(source)
    if folder is not None:
        check_generation(folder, sampling=source != "vllm")


def _check_length(config: EngineConfig, target: Target, fields: ConfigJson) -> None:
    """Refuse sequences that are longer than vLLM lets the model's be (`_get_and_verify_max_len`)."""
    asked = config.max_model_len
    if (
        asked is None
        or names_flag(config.extra_args, "--hf-overrides")
        or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0"
    ):
        return
    ropes = [fields.get("rope_parameters"), fields.get("rope_scaling")]
    ropes = [part for rope in ropes if isinstance(rope, dict) for part in (rope, *rope.values())]
    factors = [factor for rope in ropes if isinstance(rope, dict) and (factor := _find_scaling(rope)) is not None]
    own = fields.get("model_max_length")
    most = max(int(target.max_model_len * max([1, *factors])), own if isinstance(own, int) else 0)
    if asked > most:
        raise CheckpointError(f"--max-model-len: expected at most {most}, the model's own, got {asked}; lower it")


def _find_scaling(rope: ConfigJson) -> float | None:
    """Find by what a rope's description extends the length; None where its config says the extended one."""
    factor, kind = rope.get("factor"), rope.get("rope_type", rope.get("type"))
    return factor if isinstance(factor, int | float) and kind not in SCALED_ALREADY else None


def _check_updates(config: EngineConfig, target: Target) -> None:
    """Raise CheckpointError for a model that is to get new weights and cannot (plugins/weight_folder.py)."""
    if not config.weight_updates:
        return
    if several := find_several(config.extra_args, (*TENSOR_PARALLEL, *PIPELINE)):
        raise CheckpointError(f"weight updates: expected one device for each engine, got {several}; drop one of them")
    if target.quantisation is not None:
        remedy = "serve the bf16 release, or `laguna compact --to fp8` of it, whose experts can be in FP8"
        expected = "weight updates: expected a checkpoint without quantization_config"
        raise CheckpointError(f"{expected}, got {describe_kind(target.quantisation)}; {remedy}")


def _check_experts(config: EngineConfig, target: Target) -> None:
    """Raise CheckpointError where no routed experts can be returned: vLLM keeps them as it keeps the prefix cache."""
    if not config.return_routed_experts:
        return
    if target.dense:
        raise CheckpointError(
            f"--return-routed-experts: expected a mixture of experts, got {config.model}, which is dense; drop the flag"
        )
    if not config.prefix_caching:
        remedy = "drop one of them"
        raise CheckpointError(f"--return-routed-experts: expected prefix caching, got --no-prefix-caching; {remedy}")


def mark_pruned(target: Target, keep_mask: str | None) -> Target:
    """Return the target with what a mask keeps of its experts; a misfit is left to who loads it."""
    if keep_mask is None:
        return target
    marked, kept = replace(target, pruned=True), _count_kept(expand(keep_mask))
    if kept is None or len(kept[1]) != target.mlp_kinds.count(SPARSE) or target.expert_size % kept[0]:
        return marked
    groups, per_layer = kept
    stored = FP8 if target.quantisation is not None and target.quantisation.kind == FP8 else PLAIN
    return replace(marked, experts=StoredExperts(stored, target.expert_size // groups, groups, per_layer))


def _count_kept(keep_mask: Path) -> tuple[int, tuple[int, ...]] | None:
    """Count the groups of an expert, and how many of all are kept in each layer; None of what is no mask."""
    try:
        mask = load_array(keep_mask, mapped=True)
    except (OSError, ValueError):
        return None
    if mask.ndim != 3 or mask.dtype != bool or not mask.shape[2]:
        return None
    return int(mask.shape[2]), tuple(int(count) for count in mask.sum(axis=(1, 2)))


def weigh(name: str) -> int:
    """Weigh a target: `Checkpoints.target_bytes` of a folder or hub id. Raises CheckpointError."""
    folder = find_folder(name)
    return 0 if folder is None else _weigh(read_served(folder).target, folder)


def _weigh(target: Target | None, folder: Path) -> int:
    """Bytes of the files that are here, else of what config.json describes; of pruned experts what the engine holds."""
    stored = 0 if target is not None and target.experts is not None else measure_weights(folder)
    return stored or (0 if target is None else estimate_held(target, dtype=target.dtype).total)


def _weigh_drafter(drafter: Drafter, folder: Path) -> int:
    return measure_weights(folder) or estimate_drafter_bytes(drafter)


def choose_chat(config: EngineConfig, folder: Path | None) -> ChatContract:
    """Choose the chat flags for a model in a folder, or for a hub id that is not on this machine."""
    if config.chat is None:
        return NO_CONTRACT
    tokenizer = find_folder(find_value(config.extra_args, "--tokenizer") or config.model)
    release = None
    if folder is not None and tokenizer is not None:
        release = read_release(folder, tokenizer, find_value(config.extra_args, "--chat-template"))
    if release is None or (release.abilities is None and not expand(config.model).is_dir()):  # or a part was fetched
        release = assume_release(config.model)
    return choose_chat_flags(release, config.chat, config.extra_args)
