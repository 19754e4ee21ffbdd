"""The command of a masked diffusion engine, and which of the launcher's flags mean nothing there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laguna_serve.serving.chat.generation import check_generation
from laguna_serve.serving.chat.template import read_template
from laguna_serve.serving.chat.vendor_defaults import ChatContract
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.diffusion import DiffusionModel, find_diffusion
from laguna_serve.serving.checkpoint.stored.weight_files import measure_weights, require_weights
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.planning.engine_config import EngineConfig

SERVER_MODULE = "laguna_serve.plugins.diffusion.server"
# Field of an engine's configuration → its flag, and what it is where nobody asks.
WITHOUT_MEANING: dict[str, tuple[str, object]] = {
    "keep_mask": ("--keep-mask", None),
    "group_indices": ("--group-indices", None),
    "gamma_schedule": ("--gamma auto", None),
    "adaptive": ("--gamma adaptive", False),
    "draft_sampling": ("--draft-sampling", "greedy"),
    "kv_cache_gib": ("--kv-cache-gib", None),
    "enforce_eager": ("--eager", False),
    "exact": ("--exact", False),
    "weight_updates": ("--weight-updates", False),
    "return_routed_experts": ("--return-routed-experts", False),
}
CHATS = ("tool_call_parser", "reasoning_parser", "thinking")


def build_diffusion_command(config: EngineConfig, model: DiffusionModel, port: int) -> list[str]:
    """Build the engine's command, everything in it checked.

    Raises:
        CheckpointError: a flag means nothing for such a model, a value is out of bounds, or weights are not there.
    """
    # Here, as the doctor's check of the installation must run where the plugins are broken.
    from laguna_serve.plugins.diffusion.errors import DiffusionError
    from laguna_serve.plugins.diffusion.server.options import parse_options, require_torchao

    check_flags(config)
    check_generation(model.folder, sampling=False)
    command = [str(model.folder), "--host", config.host, "--port", str(port)]
    command += ["--served-model-name", config.model_name, "--dtype", config.dtype]
    command += ["--max-num-seqs", str(config.max_num_seqs)]
    if config.max_model_len is not None:
        if config.max_model_len > model.max_model_len:
            expected = f"expected at most {model.max_model_len}, the model's own"
            raise CheckpointError(f"--max-model-len: {expected}, got {config.max_model_len}; lower it")
        command += ["--max-model-len", str(config.max_model_len)]
    if config.draft is not None:
        command += ["--draft", str(find_draft(config.draft, model).folder)]
    if config.gamma is not None:
        command += ["--states", str(config.gamma)]
    command += ["--seed", str(config.seed)]
    command += config.extra_args
    try:
        options = parse_options(command)
        options.check_block(model.max_model_len)
        require_torchao(options.draft_weights)
    except DiffusionError as error:
        raise CheckpointError(str(error)) from None
    return [sys.executable, "-m", SERVER_MODULE, *command]


def count_states(draft: str | None, gamma: int | None, flags: Sequence[str]) -> int:
    """Count the states that an engine proposes per request and pass: γ as given, else as its flags or itself say.

    Raises:
        CheckpointError: it does not take the flags.
    """
    from laguna_serve.plugins.diffusion.errors import DiffusionError
    from laguna_serve.plugins.diffusion.server.options import parse_options

    drafting = [] if draft is None else ["--draft", draft]
    states = [] if gamma is None else ["--states", str(gamma)]
    try:
        return parse_options(["MODEL", *drafting, *states, *flags]).proposed_states
    except DiffusionError as error:
        raise CheckpointError(str(error)) from None


def check_flags(config: EngineConfig) -> None:
    """Raise CheckpointError for a flag of the launcher that means nothing for such a model."""
    given = [flag for name, (flag, default) in WITHOUT_MEANING.items() if getattr(config, name) != default]
    given += [f"--{name.replace('_', '-')}" for name in CHATS if getattr(config.chat, name, None) is not None]
    if given:
        raise CheckpointError(f"{given[0]}: expected a Laguna, got a masked diffusion model; drop it")
    ours = ("--model", "--host", "--port", "--served-model-name", "--draft")
    for argument in config.extra_args:
        if (flag := argument.partition("=")[0]) in ours:
            raise CheckpointError(f"{flag}: expected it from the launcher, got it among the engine's flags; move it")


def find_draft(name: str, model: DiffusionModel) -> DiffusionModel:
    """Find the draft of a model.

    Raises:
        CheckpointError: it is none, or does not fit.
    """
    draft = find_diffusion(name)
    if draft is None:
        raise CheckpointError(f"{name}: expected a smaller LLaDA as the draft of one, got another model; choose one")
    for field in ("vocab_size", "mask_token_id"):
        expected, got = getattr(model, field), getattr(draft, field)
        if expected != got:
            raise CheckpointError(f"{name}: expected {field} {expected}, as the model has, got {got}; choose another")
    return draft


def require_files(config: EngineConfig, model: DiffusionModel) -> None:
    """Raise CheckpointError where weights or tokenizer are not there; of a hub id nobody fetches them at a start."""
    if not expand(config.model).is_dir() and not measure_weights(model.folder):
        name = config.model
        raise CheckpointError(
            f"{name}: expected its weights on this machine, got none; download it: hf download {name}"
        )
    folders = [model.folder] + ([] if config.draft is None else [find_draft(config.draft, model).folder])
    for folder in folders:
        require_weights(folder, complete=True)
    if not (model.folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{model.folder}: expected a tokenizer (tokenizer.json), got none; fetch it")


def find_chat(model: DiffusionModel) -> ChatContract:
    """Say whether it chats; it has no tools and no thoughts apart."""
    return ChatContract(template=read_template(model.folder) is not None)
