"""The flags that say what two arms are: engines to start here, or endpoints that already run."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec
from laguna_serve.bench.arms.diffusion import keep_proposals, serves_diffusion
from laguna_serve.bench.arms.drafters import BeyondBlock, Dtype, find_most
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds
from laguna_serve.serving.machine.dtype import AUTO
from laguna_serve.serving.planning.diffusion.command import count_states
from laguna_serve.serving.planning.launch import DTYPES, find_engine_dtype
from laguna_serve.serving.speculation.flags import ADAPTIVE, GammaOrAdaptive

# What of them decides how an arm answers; the first three name checkpoints.
ENGINE_FLAGS = (
    "model",
    "candidate_model",
    "draft",
    "gamma",
    "baseline_args",
    "candidate_args",
    "dtype",
    "eager",
    "exact",
)


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """Two arms: a baseline, and a candidate that differs from it by what --candidate-… and --draft give it."""

    model: Annotated[
        str | None,
        Flag(
            "target checkpoint, folder or hub id (with URLs: the served name)",
            metavar="M",
            group="engines to start here",
        ),
    ] = None
    candidate_model: Annotated[
        str | None, Flag("the candidate's checkpoint, where it is another (pruned, unpadded)", metavar="M")
    ] = None
    draft: Annotated[str | None, Flag("DFlash drafter checkpoint: the candidate's only difference", metavar="D")] = None
    gamma: GammaOrAdaptive = None
    beyond_block: BeyondBlock = False
    baseline_args: Annotated[str, Flag("extra vLLM flags for the baseline, after an =", metavar="…")] = ""
    candidate_args: Annotated[str, Flag("extra vLLM flags for the candidate, after an =", metavar="…")] = ""
    dtype: Dtype = "auto"
    eager: Annotated[bool, Flag("no compilation, no graphs: starts fast, runs slowly")] = False
    exact: Annotated[
        Literal["candidate", "both"] | None,
        Flag("serve with --exact, checked at the start: the candidate alone, to see its cost, or both"),
    ] = None
    prefix_caching: Annotated[bool, Flag("turn prefix caching on (default: off)")] = False
    kv_cache_gib: Annotated[float | None, Flag("KV cache per engine (default: by free memory)", metavar="G")] = None
    seed: Annotated[int, Flag("order of the arms, bootstrap, engines (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    baseline_url: Annotated[
        str | None, Flag("for example http://127.0.0.1:8000", metavar="U", group="or endpoints that already run")
    ] = None
    candidate_url: Annotated[str | None, Flag(metavar="U")] = None

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing."""
        check_bounds(self)
        by_url = self.by_url
        if by_url != (self.candidate_url is not None):
            raise FlagError("--baseline-url and --candidate-url: expected both or neither, got one")
        for_engines = (
            self.draft,
            self.gamma,
            self.candidate_model,
            self.baseline_args,
            self.candidate_args,
            self.exact,
            self.eager,
            self.prefix_caching,
            self.kv_cache_gib,
        )
        if by_url and any(for_engines):
            raise FlagError(
                "--draft, --gamma, --candidate-model, --exact, --eager, --prefix-caching, --kv-cache-gib and extra "
                "args: expected none with URLs, as those servers already run; drop them"
            )
        if by_url and self.dtype not in DTYPES:
            raise FlagError(f"--dtype: expected {', '.join(DTYPES)}, got {self.dtype!r}")
        if not by_url and self.model is None:
            raise FlagError("--model: expected a checkpoint, or two URLs, got neither")
        if self.gamma is not None and self.draft is None:
            raise FlagError("--gamma: expected --draft beside it, got none")
        if self.beyond_block and self.fixed_gamma is None:
            raise FlagError(f"--beyond-block: expected --gamma N beside it, got {self.gamma or 'none'}")
        for name in ("baseline_args", "candidate_args"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                flag = f"--{name.replace('_', '-')}"
                raise FlagError(f"{flag}: expected flags as in a shell, got {str(error).lower()}") from None

    @property
    def by_url(self) -> bool:
        """No engine is started here."""
        return self.baseline_url is not None

    @property
    def starts_diffusion(self) -> bool:
        """Masked diffusion engines are started here."""
        return not self.by_url and serves_diffusion(self.model)

    @property
    def fixed_gamma(self) -> int | None:
        """γ where it is a number; None for the drafter's most, up to which an adaptive one goes."""
        return self.gamma if isinstance(self.gamma, int) else None


def make_spec(config: ArmsConfig, name: str) -> ArmSpec:
    """One arm from the command line. The baseline is the candidate without what --candidate-… and --draft give it."""
    url = config.baseline_url if name == BASELINE else config.candidate_url
    if url is not None:
        return ArmSpec(name, f"running at {url}", url=url, model_name=config.model)
    extra = tuple(shlex.split(config.baseline_args if name == BASELINE else config.candidate_args))
    drafting = name == CANDIDATE and config.draft is not None
    other = config.candidate_model if name == CANDIDATE else None
    model = config.model if other is None else other
    assert model is not None
    gamma = "its trained maximum" if config.gamma is None else str(config.gamma)
    if name == CANDIDATE and serves_diffusion(model):
        gamma = str(count_states(config.draft, config.fixed_gamma, extra))
        extra = keep_proposals(extra)
    engine = EngineConfig(
        model=model,
        draft=config.draft if drafting else None,
        gamma=config.fixed_gamma if drafting else None,
        adaptive=drafting and config.gamma == ADAPTIVE,
        beyond_block=config.beyond_block and drafting,
        dtype=settle_arms_dtype(config),
        enforce_eager=config.eager,
        prefix_caching=config.prefix_caching,
        kv_cache_gib=config.kv_cache_gib,
        seed=config.seed,
        exact=config.exact == "both" or (config.exact == "candidate" and name == CANDIDATE),
        extra_args=extra,
    )
    parts = [model, f"drafter {config.draft}, γ {gamma}" if drafting else "no drafter"]
    most = find_most(config.draft) if config.beyond_block and drafting and config.draft else None
    parts += (
        [f"beyond the drafter's block − 1 = {most}"] if most is not None and (config.fixed_gamma or 0) > most else []
    )
    parts += ["eager"] if config.eager else []
    parts += ["exact"] if engine.exact else []
    parts += [shlex.join(extra)] if extra else []
    return ArmSpec(name, "; ".join(parts), config=engine)


def settle_arms_dtype(config: ArmsConfig) -> str:
    """Settle what both arms compute in.

    That is what was asked for, else what the baseline's model gets on this machine; "auto" by URL.
    """
    if config.dtype != AUTO or config.model is None or config.baseline_url is not None:
        return config.dtype
    return find_engine_dtype(EngineConfig(model=config.model))


def find_dtype(config: ArmsConfig) -> str:
    """Find the models' dtype: as asked, else as the machine or the checkpoint says, else unknown.

    Unknown is judged as strictly as float32.
    """
    if (settled := settle_arms_dtype(config)) != AUTO:
        return {"half": "float16", "float": "float32"}.get(settled, settled)
    try:
        folder = find_folder(config.model or "")
        declared = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
    except (CheckpointError, OSError, ValueError):
        return "unknown"
    return str(declared.get("dtype") or declared.get("torch_dtype") or "unknown")
