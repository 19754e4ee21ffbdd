"""Write a keep mask of any share from the scores of an expert's groups; score_experts.py writes three shares.

The share's lowest-scored groups go, over all layers together, but every expert keeps its best.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import PruningError, load_array, narrow_scores, rank_groups
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.files import WriteError, write_stream
from laguna_serve.serving.kit.flags import Flag
from laguna_serve.serving.kit.run_dir import check_out_file

EXAMPLES = """examples:
  python scripts/pruning_mask.py tests/toy/masks/group_scores_importance_sorted.npy --share 0.2 --out mask.npy

exit status: 0 written, 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How much of what was scored goes."""

    scores: Annotated[Path, Flag("float32 [layers, experts, groups]", metavar="SCORES.npy", positional=True)]
    share: Annotated[float, Flag("of all groups, to prune: 0.2 is a fifth")]
    out: Annotated[Path, Flag("bool, of the same shape", metavar="M.npy")]


class MaskResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_mask/1"):
    """A mask that was written."""

    out: str
    groups: int
    pruned_groups: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/pruning_mask.py", MaskConfig, __doc__, EXAMPLES, others=(PruningError,))
    return command.run(argv, write_mask)


def write_mask(config: MaskConfig) -> MaskResult:
    """Rank the groups and write what stays.

    Raises:
        PruningError: the scores cannot be read, the share cannot be had, or the file cannot be written.
    """
    if config.out.resolve() == config.scores.resolve():
        raise PruningError(f"--out: expected another file than the scores, got {config.out}; name a new one")
    keep = rank_groups(read_scores(config.scores), config.share, "--share")
    check_out_file(config.out)
    try:
        write_stream(config.out, lambda file: np.save(file, keep))
    except WriteError as error:
        raise PruningError(f"{error}; check --out") from None
    return MaskResult(out=str(config.out), groups=keep.size, pruned_groups=int((~keep).sum()))


def read_scores(path: Path) -> npt.NDArray[np.float32]:
    """Read the file's scores. Raises PruningError when there are none."""
    scores = load_array(path, mapped=False)
    if scores.dtype.kind != "f" or scores.ndim != 3 or not scores.size:
        got = f"{scores.dtype} {list(scores.shape)}"
        expected = "float scores [layers, experts, groups]"
        raise PruningError(f"{path}: expected {expected}, got {got}; pass group_scores_importance_sorted.npy")
    return narrow_scores(scores, path)


if __name__ == "__main__":
    sys.exit(main())
