"""The flags of the experiments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.scripts.training.dense.config import FULL, DistillConfig
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, BoundedConfig, Flag


def _parse_ks(text: str) -> tuple[int, ...]:
    """Read K,K,…; 0 is the whole vocabulary."""
    parts = text.split(",")
    if not all(part == FULL or (part.isdecimal() and int(part)) for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers of tokens or {FULL!r}, got {text!r}; for example 8,32,full")
    return tuple(0 if part == FULL else int(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig(BoundedConfig):
    """A toy teacher, and how long its students learn."""

    teacher: Annotated[str, Flag("folder of a toy Laguna", positional=True)]
    out: Annotated[Path, Flag("folder for experiments.json, experiments.md and the work folder", metavar="DIR")]
    top_k: Annotated[
        tuple[int, ...], Flag("K of the stores (default 8,32,128,full)", metavar="K,K,…", parse=_parse_ks)
    ] = (8, 32, 128, 0)
    stage1_steps: Annotated[int, Flag("default 200", at_least=1)] = 200
    stage2_steps: Annotated[int, Flag("default 300", at_least=1)] = 300
    rows: Annotated[int, Flag("sequences in a batch (default 4)", at_least=1)] = 4
    length: Annotated[int, Flag("tokens in a sequence (default 256)", at_least=2)] = 256
    measure_tokens: Annotated[int, Flag("held-out tokens to measure the loss on (default 16384)", at_least=1)] = 16_384
    requests: Annotated[int, Flag("held-out requests that are answered (default 64)", at_least=1)] = 64
    budget: Annotated[int, Flag("tokens of an answer at most (default 256)", at_least=1)] = 256
    threads: Annotated[int, Flag("on a CPU (default 1)", at_least=1, at_most=MOST_THREADS)] = 1
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0

    @property
    def work(self) -> Path:
        """Where parts are kept."""
        return self.out / "work"

    @property
    def distil(self) -> DistillConfig:
        """The distillation that the arms have in common."""
        return DistillConfig(
            teacher=self.teacher,
            out=self.out,
            stage1_steps=self.stage1_steps,
            stage2_steps=self.stage2_steps,
            rows=self.rows,
            length=self.length,
            measure_tokens=self.measure_tokens,
            warm_up=min(100, self.stage2_steps // 10),
            threads=self.threads,
            seed=self.seed,
        )

    @property
    def settings(self) -> dict[str, int | float | str]:
        """What the figures depend on besides the teacher."""
        names = ("stage1_steps", "stage2_steps", "rows", "length", "measure_tokens", "requests", "budget")
        return {name: getattr(self, name) for name in (*names, "threads", "seed")}
