"""What of an identity is the certificate's own: which models, and how both arms are set."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec
from laguna_serve.bench.arms.options import ArmsConfig, find_dtype
from laguna_serve.bench.certificate.identity import (
    THREADS_PART,
    WEIGHTS,
    Identity,
    list_threads,
    make_identity,
    read_machine,
    read_weights,
)
from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.flags.vllm import find_value
from laguna_serve.serving.planning.diffusion.command import count_states
from laguna_serve.serving.speculation.drafting import open_drafter, resolve_gamma
from laguna_serve.serving.speculation.flags import ADAPTIVE

BASELINE_ROLE, CANDIDATE_ROLE, DRAFT_ROLE = "target", "candidate's target", "drafter"
DTYPE, GAMMA, COMPILE = "dtype", "γ", "compile mode"
# Of an arm's flags, those that choose kernels are named apart.
BACKENDS = {"attention backend": "--attention-backend", "MoE backend": "--moe-backend"}


def find_identity(config: ArmsConfig, specs: Mapping[str, ArmSpec], environment: Environment) -> Identity | None:
    """Find the identity of a certificate; None for endpoints by URL, whose machine is not known.

    Raises:
        EngineError, IdentityError, OSError: it cannot be found out.
    """
    if specs[BASELINE].config is None or config.model is None:
        return None
    models = {BASELINE_ROLE: config.model, CANDIDATE_ROLE: config.candidate_model, DRAFT_ROLE: config.draft}
    named = {role: name for role, name in models.items() if name is not None}
    parts = read_machine(environment, config.model) | read_weights(named) | _list_settings(config)
    return make_identity(parts, named)


def digest_lasting(identity: Identity) -> str:
    """Digest what it says of all but weights, and what is found by them: a run that fetches them first goes on."""
    found = {THREADS_PART, GAMMA}
    parts = {name: said for name, said in identity.parts.items() if name not in found and not name.startswith(WEIGHTS)}
    return make_identity(parts | list_threads(), {}).sha256


def _list_settings(config: ArmsConfig) -> dict[str, str]:
    parts = {DTYPE: find_dtype(config), COMPILE: "eager" if config.eager else "compiled"}
    if config.draft is not None:
        most = str(find_gamma(config) or "the drafter's most")
        parts[GAMMA] = f"adaptive, up to {most}" if config.gamma == ADAPTIVE else most
    settings: dict[str, object] = {"prefix caching": config.prefix_caching, "exact": config.exact or "no"}
    for arm, text in ((BASELINE, config.baseline_args), (CANDIDATE, config.candidate_args)):
        flags = shlex.split(text)
        settings[f"{arm}'s vLLM flags"] = shlex.join(flags)
        for name, flag in BACKENDS.items():
            settings[f"{arm}'s {name}"] = find_value(flags, flag) or "vLLM's choice"
    return parts | {f"setting, {name}": str(value) for name, value in settings.items()}


def find_gamma(config: ArmsConfig) -> int | None:
    """Find γ: as given, else the most that the drafter was trained for; None for one that is not on this machine."""
    if config.starts_diffusion:
        return count_states(config.draft, config.fixed_gamma, shlex.split(config.candidate_args))
    folder = None if config.draft is None else find_folder(config.draft)
    if folder is None or config.draft is None:
        return config.fixed_gamma
    return resolve_gamma(config.fixed_gamma, open_drafter(folder, config.draft))
