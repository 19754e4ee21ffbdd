"""Which completions are drawn and compared: the configuration of bench/sampling.py, and its engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from laguna_serve.bench.arms.arms import BASELINE, ArmSpec
from laguna_serve.bench.arms.drafters import DrafterOrUrlsConfig, check_draft_sampling, choose_gammas
from laguna_serve.bench.harness.prompts import PromptsConfig
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, FlagError, Quick, parse_numbers
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING
from laguna_serve.serving.speculation.flags import ADAPTIVE, DraftSampling

# γ of an arm: a number, or decided in every step.
Gamma = int | Literal["adaptive"]
DEFAULT_GAMMAS = (1, 3, 7)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(PromptsConfig, DrafterOrUrlsConfig):
    """Which γ to test, on how many completions of which prompts; the files go to `out`."""

    gammas: Annotated[
        tuple[int, ...] | None,
        Flag(
            "γ to test (default: 1,3,7 as far as the drafter goes)",
            metavar="N,…",
            at_least=1,
            parse=parse_numbers,
        ),
    ] = None
    adaptive: Annotated[
        bool, Flag("γ decided in every step (laguna serve --gamma adaptive), beside those of --gammas if any are given")
    ] = False
    draft_sampling: DraftSampling = "greedy"
    num_prompts: Annotated[int, Flag("the first N prompts (default: 24)", metavar="N", at_least=1)] = 24
    completions: Annotated[int, Flag("per prompt and arm (default: 600)", metavar="N", at_least=20)] = 600
    batch: Annotated[
        int,
        Flag("completions together, which decides what an adaptive γ comes to (default: 50)", metavar="N", at_least=1),
    ] = 50
    tokens: Annotated[int, Flag("of a completion (default: 8)", metavar="N", at_least=2)] = 8
    temperature: Annotated[float, Flag("default: 1", metavar="T", at_most=2)] = 1.0
    level: Annotated[
        float,
        Flag("how often a sound drafter may be called wrong, over all γ together (default: 0.01)", metavar="α"),
    ] = 0.01
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
    # Where gammas are not given: the drafter's most alone.
    largest_gamma: bool = False

    QUICK: ClassVar = Quick(
        "8 prompts × 200 completions, the drafter's largest γ",
        {"num_prompts": 8, "completions": 200, "largest_gamma": True},
    )

    def __post_init__(self) -> None:
        """Refuse greedy decoding, and a level that is no probability."""
        super().__post_init__()
        if self.by_url and (self.gammas or self.adaptive):
            raise FlagError("--gammas, --adaptive: expected none with URLs, which say their γ; drop it")
        if not self.temperature > 0:
            raise FlagError(
                f"--temperature: expected more than 0, got {self.temperature:g}; greedy parity: bench/certify.py"
            )
        check_draft_sampling(self.draft_sampling, self.temperature, by_url=self.by_url)
        if not 0 < self.level < 1:
            raise FlagError(f"--level: expected a probability between 0 and 1, got {self.level:g}")

    @property
    def samples(self) -> Path:
        """The folder of finished arms."""
        return self.out / "samples"

    def list_gammas(self) -> list[Gamma]:
        """List the γ to test: those given, else 1, 3 and 7 as far as the drafter goes, or its most, or adaptive alone.

        Raises:
            CheckpointError: the drafter cannot be read, or was not trained for one of them.
        """

        def choose(most: int) -> list[int]:
            return [most] if self.largest_gamma else sorted({min(gamma, most) for gamma in DEFAULT_GAMMAS})

        if self.by_url:
            return sorted(gamma for gamma, _ in self.candidate_url)
        if self.adaptive and not self.gammas:
            return [ADAPTIVE]
        also: list[Gamma] = [ADAPTIVE] if self.adaptive else []
        return also + choose_gammas(self.draft, self.gammas, choose, unknown=DEFAULT_GAMMAS)

    def make_spec(self, gamma: Gamma | None, seed: int) -> ArmSpec:
        """Make the baseline (None), or the candidate of a γ."""
        if gamma != ADAPTIVE and (running := self.make_url_spec(gamma)) is not None:
            return running
        engine = EngineConfig(
            model=self.model,
            draft=None if gamma is None else self.draft,
            gamma=None if gamma == ADAPTIVE else gamma,
            adaptive=gamma == ADAPTIVE,
            draft_sampling=DRAFT_SAMPLING[0] if gamma is None else self.draft_sampling,
            dtype=self.dtype,
            enforce_eager=self.eager,
            prefix_caching=False,
            kv_cache_gib=self.kv_cache_gib,
            seed=seed,
        )
        if gamma is None:
            return ArmSpec(BASELINE, f"{self.model}; no drafter", config=engine)
        return ArmSpec(f"gamma{gamma}", f"{self.model}; drafter {self.draft}, γ {gamma}", config=engine)
