"""A GRPO run: the flags of scripts/grpo.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.scripts.training.rl.refresh.notes import RefreshRun
from laguna_serve.scripts.training.rl.steps import GrpoRun
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.run_dir import fingerprint
from laguna_serve.serving.speculation.flags import ADAPTIVE, DraftSampling, GammaOrAdaptive

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """A policy to train, on what, and for how long."""

    model: Annotated[str, Flag("Laguna checkpoint to start from: a folder", metavar="M")]
    draft: Annotated[str | None, Flag("DFlash drafter that speculates for it", metavar="D")] = None
    gamma: GammaOrAdaptive = None
    draft_sampling: DraftSampling = "greedy"
    prompts: Annotated[
        Path,
        Flag('JSON Lines with "id" and "prompt"; a quarter of the files is held out (default: the toy prompts)'),
    ] = ROOT / "tests/toy/prompts.jsonl"
    out: Annotated[Path, Flag("folder for log, state and versions", metavar="DIR")]
    steps: Annotated[int, Flag("default 60", at_least=1)] = 60
    prompts_per_step: Annotated[int, Flag("default 8", metavar="N", at_least=1)] = 8
    group: Annotated[int, Flag("completions per prompt (default 8)", metavar="N", at_least=2)] = 8
    max_tokens: Annotated[int, Flag("of a completion (default 40)", metavar="N", at_least=2)] = 40
    lr: Annotated[float, Flag("AdamW's (default 0.0002)")] = 2e-4
    replay_experts: Annotated[
        bool, Flag("train with the experts that the engine chose (default: on, for a mixture)", either_way=True)
    ] = True
    importance_cap: Annotated[
        float, Flag("the most that a token weighs, as trainer's ÷ engine's probability (default 2)", at_least=1)
    ] = 2.0
    drop_beyond: Annotated[
        float | None,
        Flag(
            "leave out completions where that ratio's geometric mean is beyond R or 1/R (default: none)",
            metavar="R",
            at_least=1,
        ),
    ] = None
    measure_every: Annotated[
        int,
        Flag(
            "steps between measurements on held-out prompts; versions are kept then (default 10)",
            metavar="N",
            at_least=1,
        ),
    ] = 10
    dtype: Annotated[str, Flag("of the engine; the trainer's is float32 (float32)")] = "float32"
    compiled: Annotated[bool, Flag("compile the engine: starts slowly, samples faster")] = False
    max_num_seqs: Annotated[int, Flag("sequences together (default 64)")] = 64
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0
    threads: Annotated[
        int, Flag("of the trainer; sums depend on their number (default 2)", at_least=1, at_most=MOST_THREADS)
    ] = 2

    refresh_drafter: Annotated[
        bool, Flag("let the drafter learn from the rollouts", group="a drafter that learns (--refresh-drafter)")
    ] = False
    refresh_every: Annotated[int, Flag("steps between refreshes (default 3)", metavar="N", at_least=1)] = 3
    refresh_steps: Annotated[int, Flag("of training in each (default 60)", metavar="N", at_least=1)] = 60
    refresh_lr: Annotated[float, Flag("AdamW's (default 0.001)", at_least=0)] = 1e-3
    replay_buffer: Annotated[
        int, Flag("rollouts that are kept to learn from (default 512)", metavar="N", at_least=1)
    ] = 512
    greedy_share: Annotated[
        float, Flag("of greedy answers among them, 0 to 1 (default 0.25)", at_least=0, at_most=1)
    ] = 0.25

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.refresh_drafter and self.draft is None:
            raise FlagError("--refresh-drafter: expected --draft with it, got none; name the drafter to begin with")
        for flag, rate in (("--lr", self.lr), ("--refresh-lr", self.refresh_lr)):
            if not 0 <= rate < 1:
                raise FlagError(f"{flag}: expected a rate from 0 to less than 1, got {rate}")
        if self.gamma == ADAPTIVE and self.draft is None:
            raise FlagError("--gamma adaptive: expected --draft with it, got none; name a drafter")

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The checkpoints that a run begins with."""
        return self.model, self.draft

    @property
    def refresh(self) -> RefreshRun | None:
        """What decides about the refreshes; None where the drafter stays as it is."""
        if not self.refresh_drafter:
            return None
        return RefreshRun(
            every=self.refresh_every,
            steps=self.refresh_steps,
            lr=self.refresh_lr,
            replay=self.replay_buffer,
            greedy_share=self.greedy_share,
            threads=self.threads,
        )

    @property
    def most(self) -> int | None:
        """γ where it is a number; None for the drafter's most, up to which an adaptive one goes."""
        return self.gamma if isinstance(self.gamma, int) else None

    @property
    def decisive(self) -> GrpoRun:
        """What decides about a run; another run's folder is not continued."""
        return GrpoRun(
            model=self.model,
            draft=self.draft,
            gamma=self.gamma,
            draft_sampling=self.draft_sampling,
            prompts_per_step=self.prompts_per_step,
            group=self.group,
            max_tokens=self.max_tokens,
            lr=self.lr,
            dtype=self.dtype,
            seed=self.seed,
            prompts=os.path.relpath(self.prompts),
            prompts_sha256=fingerprint(str(self.prompts)),
            replay_experts=self.replay_experts,
            importance_cap=self.importance_cap,
            drop_beyond=self.drop_beyond,
            refresh=msgspec.UNSET if self.refresh is None else self.refresh,
        )
