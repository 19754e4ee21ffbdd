"""Which score prunes best?  Held-out loss against bytes for the masks of every score, and how far the scores agree.

Scores come from passes over random draws of the calibration text (one per seed).  Masks are applied in memory, no
checkpoint is written, in the model's own format and in FP8 as `laguna compact --to fp8` stores it: groups by `loss`,
`heapr`, `output`, `magnitude` and `reap`, single atoms by two of them, whole experts as REAP takes them from the router
and as MoNE replaces them by constants, random groups, and the blocks of `heapr` routed to one by one.  Differences are
paired by row and draw.

Writes frontier.json, frontier.md and pictures to --out.  Every loss is noted as it is measured: the same command goes
on after an interruption, and with more --seeds measures what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.frontier.page import format_page, format_summary
from laguna_serve.scripts.frontier.result import FrontierResult
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out

EXAMPLES = """
examples:
  python scripts/frontier --model tests/toy/teacher --out out/frontier
  python scripts/frontier --model M --calibration chunks.npy --tokens held-out-chunks.npy --out DIR
  python scripts/frontier --model M --calibration code.jsonl --text held-out.jsonl --tokens 65536 --seeds 5 --out DIR

exit status:
  0    measured
  2    could not run: bad input, or --out holds a measurement with other settings
  130  interrupted: the same command continues
"""


def parse_tokens(text: str) -> int | Path:
    """Read a number of tokens, or a file of token ids. Raises ValueError."""
    return Path(text) if text.endswith(".npy") else int(text)


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Whose experts to prune by every score, and what to measure on."""

    model: Annotated[str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", metavar="M")]
    calibration: Annotated[str, Flag("text of the scores, as score_experts.py --text", metavar="TEXT")] = "toy:training"
    calibration_tokens: Annotated[
        int, Flag("about how many tokens of it in a draw (default: 98304)", metavar="N", at_least=1)
    ] = 98_304
    text: Annotated[str, Flag("text of the losses (default: toy:held-out)", metavar="TEXT")] = "toy:held-out"
    tokens: Annotated[
        int | Path,
        Flag(
            "about how many tokens of it (default: 16384); or chunks.npy, token ids that are measured whole",
            metavar="N|FILE",
            parse=parse_tokens,
        ),
    ] = 16_384
    length: Annotated[int | None, Flag("tokens in a row at most (default: 384; of a .npy, its own)", metavar="N")] = (
        None
    )
    block_size: Annotated[int | None, Flag("atoms in a group (default: an eighth of an expert)", metavar="N")] = None
    seeds: Annotated[
        int, Flag("draws of the calibration text, and random masks per share (default: 3)", metavar="N", at_least=1)
    ] = 3
    device: Annotated[Literal["cpu", "cuda"], Flag("where it is computed (default: cpu)")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], Flag("in which it is computed (default: float32)")] = "float32"
    out: Annotated[Path, Flag("folder for the result files and what was measured so far", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if isinstance(self.tokens, int) and self.tokens < 1:
            raise FlagError(f"--tokens: expected at least 1, got {self.tokens}")
        if isinstance(self.tokens, Path) and self.text != "toy:held-out":
            raise FlagError(f"--tokens: expected a number beside --text, got {self.tokens}; leave one of them out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/frontier",
        FrontierConfig,
        __doc__,
        EXAMPLES,
        others=(PruningError,),
        interrupted=CONTINUES,
    )
    return command.run(argv, measure_frontier, show=format_summary, line=Brief(without=("published",)))


def measure_frontier(config: FrontierConfig) -> FrontierResult:
    """Score, prune in memory and measure; write frontier.json, frontier.md and the pictures.

    Raises:
        CheckpointError, PruningError: model, text or tokens cannot be used.
        RunDirError: --out holds another measurement's parts.
    """
    check_out(config.out)
    from laguna_serve.scripts.frontier.measurement import measure
    from laguna_serve.scripts.frontier.plot import draw_frontier

    result = measure(config)
    write_result(config.out / "frontier.json", result)
    write_text(config.out / "frontier.md", format_page(result))
    draw_frontier(result, config.out / "frontier.png")
    return result


if __name__ == "__main__":
    sys.exit(main())
