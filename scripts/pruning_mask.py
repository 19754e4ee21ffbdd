"""Write a keep mask of any share from the scores of an expert's groups; score_experts.py writes three shares.

The share's lowest-scored groups go, over all layers together, but every expert keeps its best.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import PruningError, rank_groups
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.serving.kit.cli import HELD, Parser
from laguna_serve.serving.kit.files import WriteError, write_stream

SCHEMA = "laguna_serve.pruning_mask/1"
EXAMPLES = """examples:
  python scripts/pruning_mask.py tests/toy/masks/group_scores_importance_sorted.npy --share 0.2 --out mask.npy

exit status: 0 written, 2 it could not run, 130 interrupted
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="scripts/pruning_mask.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("scores", type=Path, metavar="SCORES.npy", help="float32 [layers, experts, groups]")
    parser.add_argument("--share", type=float, required=True, help="of all groups, to prune: 0.2 is a fifth")
    parser.add_argument("--out", type=Path, required=True, metavar="M.npy", help="bool, of the same shape")
    return parser.parse_args(argv)


def read_scores(path: Path) -> npt.NDArray[np.float32]:
    """The file's scores. Raises PruningError when there are none."""
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PruningError(f"{path}: expected a NumPy file (.npy), got one that cannot be read ({error})") from None
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.ndim != 3:
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, np.ndarray) else "an archive"
        expected = "float scores [layers, experts, groups]"
        raise PruningError(f"{path}: expected {expected}, got {got}; pass group_scores_importance_sorted.npy")
    return scores.astype(np.float32)


def run(args: argparse.Namespace) -> int:
    keep = rank_groups(read_scores(args.scores), args.share)
    try:
        write_stream(args.out, lambda file: np.save(file, keep))
    except WriteError as error:
        raise PruningError(f"{error}; check --out") from None
    result: dict[str, Any] = {"schema": SCHEMA, "out": str(args.out), "groups": keep.size}
    print(json.dumps({**result, "pruned_groups": int((~keep).sum())}))
    return HELD


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(run, parse(argv), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
