"""What rollouts are measured: the configuration of bench/rollouts.py, and the engines that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec
from laguna_serve.bench.arms.drafters import (
    DrafterOrUrlsConfig,
    Sequential,
    check_draft_sampling,
)
from laguna_serve.bench.harness.prompts import PromptsConfig
from laguna_serve.bench.harness.validity import MIN_PAIRS
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, FlagError, parse_numbers
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING
from laguna_serve.serving.speculation.flags import ADAPTIVE, DraftSampling, GammaOrAdaptive

GROUP = 8
# Batches by default: one sequence alone, then so many groups.
GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig(PromptsConfig, DrafterOrUrlsConfig):
    """Groups of sampled completions at every batch size, for the model and later versions of it; files go to `out`."""

    gamma: GammaOrAdaptive = None
    draft_sampling: DraftSampling = "greedy"
    versions: Annotated[
        tuple[Path, ...],
        Flag(
            "checkpoint folders of later policies, in order; the tensors are the model's",
            metavar="FOLDER",
            several=True,
        ),
    ] = ()
    version_batch: Annotated[
        int | None, Flag("batch for the versions (default: one group)", metavar="N", at_least=1)
    ] = None
    batch: Annotated[
        tuple[int, ...] | None,
        Flag(
            "sequences in flight: multiples of the group, or less than one (default: 1 and 1, 2, 4, 8 groups)",
            metavar="N,…",
            parse=parse_numbers,
        ),
    ] = None
    group: Annotated[int, Flag(f"completions per prompt (default: {GROUP})", metavar="N", at_least=1)] = GROUP
    max_tokens: Annotated[int, Flag("of a completion (default: 128)", metavar="N", at_least=2)] = 128
    temperature: Annotated[float, Flag("default: 1", metavar="T")] = 1.0
    rounds: Annotated[
        int,
        Flag(f"of each arm at each point, at least {MIN_PAIRS} (default: 12)", metavar="N", at_least=MIN_PAIRS),
    ] = 12
    sequential: Sequential = None
    prefix_caching: Annotated[
        bool, Flag("a group's completions compute their prompt one by one (default: they share it)")
    ] = True
    price_per_hour: Annotated[
        float | None,
        Flag("of the device, in your currency: the price of a million tokens is worked out from it", metavar="X"),
    ] = None
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse batches that are not whole groups, greedy decoding, and a price that is none."""
        super().__post_init__()
        if self.by_url and (self.gamma is not None or len(self.candidate_url) != 1):
            raise FlagError("--candidate-url: expected one, with its γ, and no --gamma beside it; drop the others")
        if self.by_url and not self.prefix_caching:
            raise FlagError("--no-prefix-caching: expected none with URLs, as those servers already run; drop it")
        for flag, batch in [("--version-batch", self.versions_at), *(("--batch", batch) for batch in self.batches)]:
            if batch < 1 or (batch > self.group and batch % self.group):
                expected = f"expected a multiple of the group of {self.group}, or less than it"
                raise FlagError(f"{flag}: {expected}, got {batch}")
        if not self.temperature > 0:
            raise FlagError(
                f"--temperature: expected more than 0, got {self.temperature:g}; greedy decoding: bench/ab.py"
            )
        check_draft_sampling(self.draft_sampling, self.temperature, by_url=self.by_url)
        if self.price_per_hour is not None and not self.price_per_hour > 0:
            raise FlagError(f"--price-per-hour: expected more than 0, got {self.price_per_hour:g}")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes asked for."""
        return self.batch or tuple(sorted({1, *(groups * self.group for groups in GROUPS)}))

    @property
    def versions_at(self) -> int:
        """The batch size of the versions."""
        return self.group if self.version_batch is None else self.version_batch

    @property
    def adaptive(self) -> bool:
        """Whether γ is decided in every step."""
        return self.gamma == ADAPTIVE

    @property
    def points(self) -> Path:
        """The folder of finished measurements."""
        return self.out / "points"

    @property
    def max_num_seqs(self) -> int:
        """The engine's own default, or more where a batch is larger."""
        return max(EngineConfig(self.model).max_num_seqs, self.versions_at, *self.batches)

    def make_engine(self, *, drafting: bool) -> EngineConfig:
        """Make an engine that trainers would roll out with: a group shares its prompt, and new weights are taken."""
        return EngineConfig(
            model=self.model,
            draft=self.draft if drafting else None,
            gamma=self.gamma if drafting and self.gamma != ADAPTIVE else None,
            adaptive=drafting and self.adaptive,
            draft_sampling=self.draft_sampling if drafting else DRAFT_SAMPLING[0],
            dtype=self.dtype,
            max_num_seqs=self.max_num_seqs,
            enforce_eager=self.eager,
            prefix_caching=self.prefix_caching,
            kv_cache_gib=self.kv_cache_gib,
            seed=self.seed + drafting,
            weight_updates=True,
        )

    def make_specs(self, gamma: int) -> tuple[ArmSpec, ArmSpec]:
        """Make the plain engine, and the one that drafts."""
        running = self.make_url_spec(None), self.make_url_spec(gamma) if self.by_url else None
        if running[0] is not None and running[1] is not None:
            return running[0], running[1]
        plain = ArmSpec(BASELINE, f"{self.model}; no drafter", config=self.make_engine(drafting=False))
        label = f"{self.model}; drafter {self.draft}, {'adaptive γ up to' if self.adaptive else 'γ'} {gamma}"
        return plain, ArmSpec(CANDIDATE, label, config=self.make_engine(drafting=True))
