"""What a γ sweep measures: the configuration of bench/gamma_sweep.py, and the engines that it stands for."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec
from laguna_serve.bench.arms.diffusion import keep_proposals, serves_diffusion
from laguna_serve.bench.arms.drafters import (
    BeyondBlock,
    DrafterOrUrlsConfig,
    Sequential,
    Temperature,
    check_draft_sampling,
    choose_gammas,
    find_most,
)
from laguna_serve.bench.harness.prompts import PromptsConfig
from laguna_serve.bench.harness.schedule import NumWarmups, Waves
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, FlagError, Quick, parse_numbers, parse_words
from laguna_serve.serving.kit.run_dir import fingerprint
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING
from laguna_serve.serving.speculation.flags import DraftSampling

FLAGS = {
    "fp8-kv": ("--kv-cache-dtype", "fp8"),
    "chunked-prefill": ("--enable-chunked-prefill", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
}
# Rounds of the largest concurrency that an interval needs.
LEAST_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Ablation:
    """One more change to both arms: its name, and of those that are another checkpoint the path."""

    name: str
    checkpoint: str | None = None

    @property
    def file_name(self) -> str:
        """What its files are called: of a checkpoint that is written anew they are others."""
        if self.checkpoint is None:
            return self.name
        written = f"{self.checkpoint} {fingerprint(self.checkpoint)}"
        return f"{self.name}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"

    def apply(self, config: EngineConfig) -> EngineConfig:
        """Return the engine with this change."""
        if self.checkpoint is not None:
            return replace(config, model=self.checkpoint)
        if self.name == "prefix-caching":
            return replace(config, prefix_caching=True)
        return replace(config, extra_args=(*config.extra_args, *FLAGS[self.name]))


def parse_ablation(text: str) -> Ablation:
    """`fp8-kv`, `prefix-caching`, `chunked-prefill`, `pruned=CHECKPOINT` or `dense=CHECKPOINT`."""
    name, given, checkpoint = text.partition("=")
    if name in ("pruned", "dense") and checkpoint:
        return Ablation(name, checkpoint)
    if name in (*FLAGS, "prefix-caching") and not given:
        return Ablation(name)
    expected = "fp8-kv, prefix-caching, chunked-prefill, pruned=CHECKPOINT or dense=CHECKPOINT"
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PromptsConfig, DrafterOrUrlsConfig):
    """Which γ to measure at which concurrency, on what; the files go to `out`."""

    gammas: Annotated[
        tuple[int, ...] | None,
        Flag(
            "γ to measure, such as 1,3,7 (default: 1 to the drafter's block − 1)",
            metavar="N,…",
            at_least=1,
            parse=parse_numbers,
        ),
    ] = None
    beyond_block: BeyondBlock = False
    concurrency: Annotated[tuple[int, ...], Flag("default: 1", metavar="N,…", at_least=1, parse=parse_numbers)] = (1,)
    waves: Waves = 1
    num_warmups: NumWarmups = None
    num_prompts: Annotated[int, Flag("the first N prompts (default: 32)", metavar="N", at_least=1)] = 32
    max_tokens: Annotated[int, Flag("output tokens per prompt (default: 96)", metavar="N", at_least=1)] = 96
    stack: Annotated[
        tuple[Ablation, ...],
        Flag(
            "then ablations at the γ chosen for the first concurrency, each against its own plain decoding and the "
            "plain target: fp8-kv, prefix-caching, chunked-prefill, pruned=CHECKPOINT, dense=CHECKPOINT",
            metavar="ABLATION",
            parse=parse_ablation,
            several=True,
        ),
    ] = ()
    sequential: Sequential = None
    adaptive: Annotated[bool, Flag("then γ decided in every step (laguna serve --gamma adaptive)")] = False
    temperature: Temperature = 0.0
    draft_sampling: DraftSampling = "greedy"
    mixed: Annotated[bool, Flag("then the schedule against the best single γ, under a load that changes")] = False
    engine_args: Annotated[
        tuple[str, ...],
        Flag("extra flags of every arm's engine, after an =, such as '--cache dual'", metavar="…", parse=parse_words),
    ] = ()
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
    # Where gammas are not given: the least, the middle and the most alone.
    three_gammas: bool = False

    QUICK: ClassVar = Quick(
        "16 prompts × 48 tokens, three γ", {"num_prompts": 16, "max_tokens": 48, "three_gammas": True}
    )

    def __post_init__(self) -> None:
        """Refuse too few prompts for an interval."""
        super().__post_init__()
        most = self.waves * max(self.concurrency)
        if self.num_prompts < LEAST_ROUNDS * most:
            expected = f"expected at least {LEAST_ROUNDS * most}, {LEAST_ROUNDS} rounds of {most}"
            raise FlagError(f"--num-prompts: {expected}, got {self.num_prompts}")
        for_engines = (self.gammas, self.stack, self.mixed, self.engine_args, self.adaptive, self.beyond_block)
        if self.by_url and any(for_engines):
            raise FlagError(
                "--gammas, --stack, --mixed, --engine-args, --adaptive and --beyond-block: expected none with URLs, as "
                "those servers already run; drop them"
            )
        check_draft_sampling(self.draft_sampling, self.temperature, by_url=self.by_url)
        if self.temperature and self.stack:
            raise FlagError("--stack: expected greedy answers, which are compared, got --temperature; drop one")

    @property
    def points(self) -> Path:
        """The folder of finished measurements."""
        return self.out / "points"

    def list_gammas(self) -> list[int]:
        """List the γ to measure: those given, else 1 to the drafter's block − 1, or three of these.

        Raises:
            CheckpointError: the drafter cannot be read, or was not trained for one of them.
        """

        def choose(most: int) -> list[int]:
            return sorted({1, (most + 1) // 2, most}) if self.three_gammas else list(range(1, most + 1))

        if self.by_url:
            return sorted(gamma for gamma, _ in self.candidate_url)
        return choose_gammas(self.draft, self.gammas, choose, beyond_block=self.beyond_block)

    @property
    def most(self) -> int:
        """The most that the drafter was trained to propose; of one that is not on this machine the largest γ."""
        return find_most(self.draft) or max(self.list_gammas())

    def make_adaptive_spec(self) -> ArmSpec:
        """Make the candidate that decides γ in every step."""
        engine = replace(self.make_engine(self.most), adaptive=True)
        return ArmSpec(CANDIDATE, f"{self.model}; drafter {self.draft}, adaptive γ up to {self.most}", config=engine)

    def is_beyond(self, gamma: int) -> bool:
        """Whether the drafter was never trained to propose so many; of endpoints that is not known."""
        most = None if self.by_url or not self.beyond_block else find_most(self.draft)
        return most is not None and gamma > most

    def make_engine(self, gamma: int | None) -> EngineConfig:
        """Make the engine of a γ, or of plain decoding (None)."""
        drafts_states = gamma is not None and serves_diffusion(self.model)
        return EngineConfig(
            model=self.model,
            draft=None if gamma is None else self.draft,
            gamma=gamma,
            beyond_block=gamma is not None and self.beyond_block,
            draft_sampling=DRAFT_SAMPLING[0] if gamma is None else self.draft_sampling,
            dtype=self.dtype,
            enforce_eager=self.eager,
            prefix_caching=False,
            kv_cache_gib=self.kv_cache_gib,
            seed=self.seed,
            extra_args=keep_proposals(self.engine_args) if drafts_states else self.engine_args,
        )

    def make_spec(self, gamma: int | None) -> ArmSpec:
        """Make the baseline (None), or the candidate of a γ."""
        if (running := self.make_url_spec(gamma)) is not None:
            return running
        engine = self.make_engine(gamma)
        if gamma is None:
            return ArmSpec(BASELINE, f"{self.model}; no drafter", config=engine)
        beyond = ", beyond its block" if self.is_beyond(gamma) else ""
        return ArmSpec(CANDIDATE, f"{self.model}; drafter {self.draft}, γ {gamma}{beyond}", config=engine)
