"""The flags that say what two arms are: engines to start here, or endpoints that already run."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from laguna_serve.bench.harness.arms import ArmSpec
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.machine.dtype import AUTO
from laguna_serve.serving.planning.launch import find_engine_dtype
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


BeyondBlock = Annotated[
    bool,
    Flag(
        "allow a γ beyond the drafter's block − 1, places it was never trained for, and mark it so (without: refused)"
    ),
]
Sequential = Annotated[
    bool | None,
    Flag(
        "one engine at a time, the baseline first and last; --no-sequential: both up, whatever the plan of the memory "
        "says (default: both where they fit)",
        either_way=True,
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
    beyond_block: BeyondBlock = False
    baseline_args: Annotated[str, Flag("extra vLLM flags for the baseline, after an =", metavar="…")] = ""
    candidate_args: Annotated[str, Flag("extra vLLM flags for the candidate, after an =", metavar="…")] = ""
    dtype: Annotated[
        str, Flag("vLLM's --dtype for both (default: the checkpoint's; float32 on a CPU that multiplies it faster)")
    ] = "auto"
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
        if self.beyond_block and self.gamma is None:
            raise FlagError("--beyond-block: expected --gamma beside it, got none")
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
    dtype: Annotated[
        str, Flag("vLLM's --dtype for both (default: the checkpoint's; float32 on a CPU that multiplies it faster)")
    ] = "auto"
    seed: Annotated[int, Flag("order of the arms, bootstrap, permutations, engines (default: 0)")] = 0

    def __post_init__(self) -> None:
        """Refuse values under their bounds."""
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class TimedDrafterConfig(DrafterConfig):
    """The same, compiled unless `eager`, with a KV cache of a given size."""

    eager: Annotated[bool, Flag("no compilation: starts fast, runs slowly")] = False
    kv_cache_gib: Annotated[float | None, Flag("KV cache per engine (default: by free memory)", metavar="G")] = None


class GammaUrl(NamedTuple):
    """An endpoint that drafts so many tokens per step."""

    gamma: int
    url: str


def parse_gamma_url(text: str) -> GammaUrl:
    """Read an endpoint with its γ, `7=http://127.0.0.1:8001`."""
    gamma, _, url = text.partition("=")
    if not gamma.isdecimal() or not int(gamma) or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"expected γ=URL like 7=http://127.0.0.1:8001, got {text!r}")
    return GammaUrl(int(gamma), url)


@dataclass(frozen=True, kw_only=True)
class DrafterOrUrlsConfig(TimedDrafterConfig):
    """The same, or endpoints that already run: what they serve is not checked, and goes by the names given."""

    baseline_url: Annotated[
        str | None,
        Flag(
            "of the plain engine; --model is then its served name, --draft what results call the drafter",
            metavar="U",
            group="or endpoints that already run",
        ),
    ] = None
    candidate_url: Annotated[
        tuple[GammaUrl, ...],
        Flag("of the engine that drafts γ tokens", metavar="γ=U", parse=parse_gamma_url, repeated=True),
    ] = ()

    def __post_init__(self) -> None:
        """Refuse half a set of endpoints, and several for one γ."""
        super().__post_init__()
        if self.by_url != bool(self.candidate_url):
            raise FlagError("--baseline-url and --candidate-url: expected both or neither, got one")
        gammas = [gamma for gamma, _ in self.candidate_url]
        if len(set(gammas)) < len(gammas):
            raise FlagError(f"--candidate-url: expected one for each γ, got {sorted(gammas)}; drop one")

    @property
    def by_url(self) -> bool:
        """No engine is started here."""
        return self.baseline_url is not None

    def list_urls(self) -> dict[str, Any]:
        """The endpoints as JSON values, for what a folder's parts were measured with; empty without any."""
        return {"urls": [self.baseline_url, *map(list, self.candidate_url)]} if self.by_url else {}

    def make_url_spec(self, gamma: int | None) -> ArmSpec | None:
        """The endpoint of a γ, or of plain decoding (None); None where engines are started here."""
        if self.baseline_url is None:
            return None
        url = self.baseline_url if gamma is None else dict(self.candidate_url)[gamma]
        name = BASELINE if gamma is None else CANDIDATE
        label = f"running at {url}" if gamma is None else f"γ {gamma}, running at {url}"
        return ArmSpec(name, label, url=url, model_name=self.model)


def choose_gammas(
    draft: str,
    given: Sequence[int] | None,
    default: Callable[[int], Sequence[int]],
    unknown: Sequence[int] | None = None,
    beyond_block: bool | None = None,
) -> list[int]:
    """The γ to measure: those given, else what `default` makes of the drafter's most.

    Of a drafter that is not on this machine: `unknown`. Those that it was not trained for only with `beyond_block`,
    None where a command has no flag for it.

    Raises:
        CheckpointError: the drafter cannot be read, or was not trained for one of them; or there are none at all.
    """
    if (most := find_most(draft)) is None:
        if (gammas := given or unknown) is None:
            expected = "--gammas for a drafter that is not on this machine"
            raise CheckpointError(f"{draft}: expected {expected}, got none; pass them")
        return list(gammas)
    gammas = list(given or default(most))
    if max(gammas) > most and not beyond_block:
        expected = f"expected at most {most}, the drafter's block − 1, got {max(gammas)}"
        remedy = "lower it" if beyond_block is None else "lower it, or measure it all the same with --beyond-block"
        raise CheckpointError(f"--gammas: {expected}; {remedy}")
    return gammas


def find_most(draft: str) -> int | None:
    """The most tokens that a drafter was trained to propose; None where it is not on this machine.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = find_folder(draft)
    return None if folder is None else open_drafter(folder, draft).max_gamma


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
        beyond_block=config.beyond_block and drafting,
        dtype=settle_arms_dtype(config),
        enforce_eager=config.eager,
        prefix_caching=config.prefix_caching,
        kv_cache_gib=config.kv_cache_gib,
        seed=config.seed,
        exact=config.exact == "both" or (config.exact == "candidate" and name == CANDIDATE),
        extra_args=extra,
    )
    gamma = "its trained maximum" if config.gamma is None else str(config.gamma)
    parts = [model, f"drafter {config.draft}, γ {gamma}" if drafting else "no drafter"]
    most = find_most(config.draft) if config.beyond_block and drafting and config.draft else None
    parts += [f"beyond the drafter's block − 1 = {most}"] if most is not None and (config.gamma or 0) > most else []
    parts += ["eager"] if config.eager else []
    parts += ["exact"] if engine.exact else []
    parts += [shlex.join(extra)] if extra else []
    return ArmSpec(name, "; ".join(parts), config=engine)


def settle_arms_dtype(config: ArmsConfig) -> str:
    """What both arms compute in: as asked, else what the baseline's model gets on this machine; "auto" by URL."""
    if config.dtype != AUTO or config.model is None or config.baseline_url is not None:
        return config.dtype
    return find_engine_dtype(EngineConfig(model=config.model))


def find_dtype(config: ArmsConfig) -> str:
    """The models' dtype: as asked, else as the machine or the checkpoint says, else unknown.

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


def parse_numbers(text: str) -> tuple[int, ...]:
    """Positive integers separated by commas, each once, rising."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive numbers like 1,3,7, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))
