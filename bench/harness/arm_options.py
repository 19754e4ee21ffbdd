"""The flags that say what two arms are: engines to start here, or endpoints that already run."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.bench.harness.arms import ArmSpec
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.speculation.drafting import open_drafter
from laguna_serve.serving.speculation.flags import parse_gamma

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


Gamma = Annotated[
    int | None,
    Flag("tokens drafted per step, N or max (default: the drafter's most)", metavar="N", parse=parse_gamma),
]
DraftSampling = Annotated[
    Literal["greedy", "probabilistic"],
    Flag(
        "how drafts for sampled requests are chosen: the likeliest token, or drawn from the drafter's distribution, "
        "which more of are accepted at the price of a vocabulary of fp32 per draft (default: greedy)"
    ),
]


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
    gamma: Gamma = None
    baseline_args: Annotated[str, Flag("extra vLLM flags for the baseline, after an =", metavar="…")] = ""
    candidate_args: Annotated[str, Flag("extra vLLM flags for the candidate, after an =", metavar="…")] = ""
    dtype: Annotated[str, Flag("vLLM's --dtype for both (default: the checkpoint's)")] = "auto"
    eager: Annotated[bool, Flag("no compilation, no graphs: starts fast, runs slowly")] = False
    exact: Annotated[
        Literal["candidate", "both"] | None,
        Flag("serve with --exact, checked at the start: the candidate alone, to see its cost, or both"),
    ] = None
    prefix_caching: Annotated[bool, Flag("turn prefix caching on (default: off)")] = False
    kv_cache_gib: Annotated[float | None, Flag("KV cache per engine (default: by free memory)", metavar="G")] = None
    seed: Annotated[int, Flag("order of the arms, bootstrap, engines (default: 0)")] = 0
    baseline_url: Annotated[
        str | None, Flag("for example http://127.0.0.1:8000", metavar="U", group="or endpoints that already run")
    ] = None
    candidate_url: Annotated[str | None, Flag(metavar="U")] = None

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing."""
        check_bounds(self)
        by_url = self.baseline_url is not None
        if by_url != (self.candidate_url is not None):
            raise FlagError("--baseline-url and --candidate-url: expected both or neither, got one")
        for_engines = (
            self.draft,
            self.gamma,
            self.candidate_model,
            self.baseline_args,
            self.candidate_args,
            self.exact,
        )
        if by_url and any(for_engines):
            raise FlagError(
                "--draft, --gamma, --candidate-model, --exact and extra args: expected none with URLs, as those "
                "servers already run; drop them"
            )
        if not by_url and self.model is None:
            raise FlagError("--model: expected a checkpoint, or two URLs, got neither")
        if self.gamma is not None and self.draft is None:
            raise FlagError("--gamma: expected --draft beside it, got none")
        for name in ("baseline_args", "candidate_args"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                flag = f"--{name.replace('_', '-')}"
                raise FlagError(f"{flag}: expected flags as in a shell, got {str(error).lower()}") from None


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """A target and a drafter for it, to be started with and without it."""

    model: Annotated[str, Flag("target checkpoint, folder or hub id", metavar="M", group="engines")]
    draft: Annotated[str, Flag("DFlash drafter checkpoint", metavar="D")]
    dtype: Annotated[str, Flag("vLLM's --dtype for both (default: the checkpoint's)")] = "auto"
    seed: Annotated[int, Flag("order of the arms, bootstrap, permutations, engines (default: 0)")] = 0

    def __post_init__(self) -> None:
        """Refuse values under their bounds."""
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class TimedDrafterConfig(DrafterConfig):
    """The same, compiled unless `eager`, with a KV cache of a given size."""

    eager: Annotated[bool, Flag("no compilation: starts fast, runs slowly")] = False
    kv_cache_gib: Annotated[float | None, Flag("KV cache per engine (default: by free memory)", metavar="G")] = None


def choose_gammas(
    draft: str,
    given: Sequence[int] | None,
    default: Callable[[int], Sequence[int]],
    unknown: Sequence[int] | None = None,
) -> list[int]:
    """The γ to measure: those given, else what `default` makes of the drafter's most.

    Of a drafter that is not on this machine: `unknown`.

    Raises:
        CheckpointError: the drafter cannot be read, or was not trained for one of them; or there are none at all.
    """
    folder = find_folder(draft)
    if folder is None:
        if (gammas := given or unknown) is None:
            expected = "--gammas for a drafter that is not on this machine"
            raise CheckpointError(f"{draft}: expected {expected}, got none; pass them")
        return list(gammas)
    most = open_drafter(folder, draft).max_gamma
    gammas = list(given or default(most))
    if max(gammas) > most:
        expected = f"expected at most {most}, the drafter's block − 1, got {max(gammas)}"
        raise CheckpointError(f"--gammas: {expected}; lower it")
    return gammas


def make_spec(config: ArmsConfig, name: str) -> ArmSpec:
    """One arm from the command line. The baseline is the candidate without what --candidate-… and --draft give it."""
    url = config.baseline_url if name == BASELINE else config.candidate_url
    if url is not None:
        return ArmSpec(name, f"running at {url}", url=url, model_name=config.model)
    extra = tuple(shlex.split(config.baseline_args if name == BASELINE else config.candidate_args))
    drafting = name == CANDIDATE and config.draft is not None
    model = (config.candidate_model if name == CANDIDATE else None) or config.model
    assert model is not None
    engine = EngineConfig(
        model=model,
        draft=config.draft if drafting else None,
        gamma=config.gamma if drafting else None,
        dtype=config.dtype,
        enforce_eager=config.eager,
        prefix_caching=config.prefix_caching,
        kv_cache_gib=config.kv_cache_gib,
        seed=config.seed,
        exact=config.exact == "both" or (config.exact == "candidate" and name == CANDIDATE),
        extra_args=extra,
    )
    gamma = "its trained maximum" if config.gamma is None else str(config.gamma)
    parts = [model, f"drafter {config.draft}, γ {gamma}" if drafting else "no drafter"]
    parts += ["eager"] if config.eager else []
    parts += ["exact"] if engine.exact else []
    parts += [shlex.join(extra)] if extra else []
    return ArmSpec(name, "; ".join(parts), config=engine)


def find_dtype(config: ArmsConfig) -> str:
    """The models' dtype: as asked, else as the checkpoint says, else unknown (judged as strictly as float32)."""
    if config.dtype != "auto":
        return {"half": "float16", "float": "float32"}.get(config.dtype, str(config.dtype))
    try:
        declared = json.loads((Path(config.model or "") / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(declared.get("dtype") or declared.get("torch_dtype") or "unknown")


def parse_numbers(text: str) -> tuple[int, ...]:
    """Positive integers separated by commas, each once, rising."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive numbers like 1,3,7, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))
