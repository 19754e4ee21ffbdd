"""The flags that say which drafter goes with a target, and which γ are measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec
from laguna_serve.bench.arms.diffusion import MOST_STATES, serves_diffusion
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag, FlagError
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING, open_drafter

Dtype = Annotated[
    str, Flag("vLLM's --dtype for both (default: the checkpoint's; float32 on a CPU that multiplies it faster)")
]
Temperature = Annotated[
    float,
    Flag("answers are drawn at it, and then not compared (default: 0, greedy)", metavar="T", at_least=0, at_most=2),
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
class DrafterConfig(BoundedConfig):
    """A target and a drafter for it, to be started with and without it."""

    model: Annotated[str, Flag("target checkpoint, folder or hub id", metavar="M", group="engines")]
    draft: Annotated[str, Flag("DFlash drafter checkpoint", metavar="D")]
    dtype: Dtype = "auto"
    seed: Annotated[
        int, Flag("order of the arms, bootstrap, permutations, engines (default: 0)", at_least=0, at_most=MOST_SEED)
    ] = 0


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
        if self.by_url and (self.eager or self.kv_cache_gib is not None):
            raise FlagError(
                "--eager and --kv-cache-gib: expected none with URLs, as those servers already run; drop them"
            )
        gammas = [gamma for gamma, _ in self.candidate_url]
        if len(set(gammas)) < len(gammas):
            raise FlagError(f"--candidate-url: expected one for each γ, got {sorted(gammas)}; drop one")

    @property
    def by_url(self) -> bool:
        """No engine is started here."""
        return self.baseline_url is not None

    def list_urls(self) -> dict[str, object]:
        """List the endpoints as JSON values, for what a folder's parts were measured with; empty without any."""
        return {"urls": [self.baseline_url, *map(list, self.candidate_url)]} if self.by_url else {}

    def make_url_spec(self, gamma: int | None) -> ArmSpec | None:
        """Describe the endpoint of a γ, or of plain decoding (None); None where engines are started here."""
        if self.baseline_url is None:
            return None
        url = self.baseline_url if gamma is None else dict(self.candidate_url)[gamma]
        name = BASELINE if gamma is None else CANDIDATE
        label = f"running at {url}" if gamma is None else f"γ {gamma}, running at {url}"
        return ArmSpec(name, label, url=url, model_name=self.model)


def check_draft_sampling(draft_sampling: str, temperature: float, *, by_url: bool = False) -> None:
    """Refuse what would not be done.

    Raises:
        FlagError: drafts are to be drawn for greedy answers, or by a server that already runs.
    """
    if draft_sampling != DRAFT_SAMPLING[0]:
        asked = f"--draft-sampling {draft_sampling}"
        if not temperature:
            expected = "expected --temperature beside it, as greedy answers are not drawn, got none"
            raise FlagError(f"{asked}: {expected}; drop it or add one")
        if by_url:
            raise FlagError(f"{asked}: expected none with URLs, as those servers already run; drop it")


def choose_gammas(
    draft: str,
    given: Sequence[int] | None,
    default: Callable[[int], Sequence[int]],
    unknown: Sequence[int] | None = None,
    beyond_block: bool | None = None,
) -> list[int]:
    """Choose the γ to measure: those given, else what `default` makes of the drafter's most.

    Of a drafter that is not on this machine: `unknown`. Those that it was not trained for only with `beyond_block`,
    None where a command has no flag for it.

    Raises:
        CheckpointError: the drafter cannot be read, or was not trained for one of them; or there are none at all.
    """
    if serves_diffusion(draft):
        return list(given or default(MOST_STATES))
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
    """Find the most tokens that a drafter was trained to propose.

    None where it is not on this machine, and for a smaller masked diffusion model, which has no most.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = find_folder(draft)
    return None if folder is None or serves_diffusion(draft) else open_drafter(folder, draft).max_gamma
