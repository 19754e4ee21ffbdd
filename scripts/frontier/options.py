"""What a frontier is measured of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.serving.kit.flags import MOST_TEXT, Flag, FlagError, check_bounds


def parse_tokens(text: str) -> int | Path:
    """Read a number of tokens, or a file of token ids. Raises ValueError."""
    return Path(text) if text.endswith(".npy") else int(text)


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Whose experts to prune by every score, and what to measure on."""

    model: Annotated[str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", metavar="M")]
    calibration: Annotated[str, Flag("text of the scores, as score_experts.py --text", metavar="TEXT")] = "toy:training"
    calibration_tokens: Annotated[
        int, Flag("about how many tokens of it in a draw (default: 98304)", metavar="N", at_least=1, at_most=MOST_TEXT)
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
