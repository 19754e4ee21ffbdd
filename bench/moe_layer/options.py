"""Which MoE layers are timed: the configuration of bench/moe.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.serving.kit.flags import ANY, MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds

MOST_TOKENS = 65536


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A layer, and the tokens, shares of pruned blocks and routings at which it is timed; the files go to `out`."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"], Flag("default: the GPU, if there is one", group="what to time")
    ] = "auto"
    tokens: Annotated[
        tuple[int, ...], Flag("default: 1,8,17,64,256", metavar="LIST", at_least=1, at_most=MOST_TOKENS)
    ] = (1, 8, 17, 64, 256)
    pruning: Annotated[
        tuple[float, ...], Flag("shares of pruned blocks (default: 0,0.25,0.4)", metavar="LIST", at_least=0)
    ] = (0.0, 0.25, 0.4)
    routing: Annotated[
        tuple[Literal["uniform", "skewed"], ...], Flag("uniform (default), skewed or both", metavar="LIST")
    ] = ("uniform",)
    weights: Annotated[
        tuple[Literal["full", "fp8"], ...] | None,
        Flag("full (--dtype's), fp8 or both (default: both)", metavar="LIST"),
    ] = None
    resume: Annotated[bool, Flag("keep the rows that an earlier run into the same folder measured")] = False
    repeats: Annotated[int | None, Flag("timed calls (CPU: 40) or replays (GPU: 30)", metavar="N", at_least=1)] = None
    threads: Annotated[
        int | None,
        Flag(
            "on a CPU (default: torch's); of one thread the processor time counts",
            metavar="N",
            at_least=1,
            at_most=MOST_THREADS,
        ),
    ] = None
    vllm: Annotated[bool, Flag("this project's kernel alone")] = True
    experts: Annotated[
        int | None, Flag("default: 256 on a GPU, 64 on a CPU", metavar="E", at_least=1, at_most=ANY, group="the layer")
    ] = None
    hidden: Annotated[int, Flag("hidden size (default: 2048)", metavar="H", at_least=1)] = 2048
    intermediate: Annotated[int, Flag("atoms of an expert (default: 512)", metavar="N", at_least=1)] = 512
    block: Annotated[int, Flag("atoms of a block (default: 64)", metavar="B", at_least=1)] = 64
    topk: Annotated[int, Flag("experts per token (default: 8)", metavar="K", at_least=1)] = 8
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Flag("default: bfloat16")] = "bfloat16"
    seed: Annotated[int, Flag("of weights and routing (default: 0)", metavar="N", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("folder for moe.json, moe.md and moe.png", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse values outside of their bounds."""
        check_bounds(self)
        if max(self.pruning) >= 1:
            raise FlagError(f"--pruning: expected less than 1, got {max(self.pruning):g}")
