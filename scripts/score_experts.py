"""Score the atoms of a Laguna's routed experts on text, and write the artefacts of structured pruning.

Written to --out, in the published formats (L sparse layers, E experts of N atoms, G groups of B atoms):

  atomic_scores.npy                      [L, E, N] float32     importance of each atom
  group_indices_importance_sorted.npy    [L, E, G, B] int64    each expert's atoms by falling score, in groups
  group_scores_importance_sorted.npy     [L, E, G] float32     sum of a group's scores
  group_keep_mask_{10,25,40}pct.npy      [L, E, G] bool        all but the lowest groups, at least one per expert
  group_keep_mask_random_{…}pct.npy      [L, E, G] bool        the control: as many groups, drawn at random
  MANIFEST.json                          how they were made, and a SHA-256 of each

`laguna compact` makes a smaller checkpoint from a mask and the indices.  The text should be the kind of text that the
model is for, and none that the result will be judged on.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import ExpertShape, PruningError, read_shape
from laguna_serve.scripts.training.pruning.artefacts import (
    ScoresManifest,
    ScoresSource,
    choose_block_size,
    hash_file,
    make_artefacts,
    read_scores,
    write_artefacts,
    write_manifest,
)
from laguna_serve.scripts.training.pruning.teacher import load_model
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import HELD, run_command
from laguna_serve.serving.kit.flags import Flag, check_bounds, read_flags
from laguna_serve.serving.kit.results import to_json

THREADS = 1  # with two, a backward pass adds up in another order every time (seen: scores differ by 7e-7)
EXAMPLES = """examples:
  python scripts/score_experts.py tests/toy/teacher --out tests/toy/masks          the toy family's (one minute)
  python scripts/score_experts.py MODEL --text code.jsonl --block-size 64 --out DIR
  python scripts/score_experts.py MODEL --atomic-scores theirs.npy --out DIR       somebody else's scores
"""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Whose atoms to score, and on what."""

    teacher: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", positional=True)
    ]
    out: Annotated[Path, Flag("folder for the artefacts")]
    text: Annotated[
        str,
        Flag("calibration text: .txt, .jsonl with text or prompt, or toy:training (default)", old=("--prompts",)),
    ] = "toy:training"
    tokens: Annotated[int, Flag("about how many tokens to read (default 98304)")] = 98_304
    length: Annotated[int, Flag("tokens in a row at most (default 384)")] = 384
    score: Annotated[Literal["loss", "output"], Flag("see training/pruning/scores.py")] = "loss"
    atomic_scores: Annotated[Path | None, Flag("take these scores [L, E, N] and read no text")] = None
    block_size: Annotated[int | None, Flag("atoms in a group (default: an eighth of an expert)")] = None
    seed: Annotated[int, Flag("of the random controls (default 0)")] = 0

    def __post_init__(self) -> None:
        check_bounds(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(ScoreConfig, argv, prog="scripts/score_experts.py", description=__doc__, epilog=EXAMPLES)

    def body() -> int:
        manifest = score_experts(config)
        print(json.dumps({"out": str(config.out), **to_json(manifest)}))
        return HELD

    return run_command("score_experts.py", body, others=(PruningError,))


def score_experts(config: ScoreConfig) -> ScoresManifest:
    """Score, group and rank; write the artefacts and their manifest.

    Raises:
        CheckpointError, PruningError: teacher, text, scores or block size cannot be used.
    """
    folder = require_folder(config.teacher)
    shape = read_shape(read_config(folder), config.teacher)
    block_size = choose_block_size(config.block_size, shape)
    if config.atomic_scores is not None:
        scores = read_scores(config.atomic_scores, shape)
        how: ScoresSource = {"score": str(config.atomic_scores), "scores_sha256": hash_file(config.atomic_scores)}
    else:
        scores, how = measure_scores(config, folder, shape)
    digests = write_artefacts(config.out, make_artefacts(scores, block_size, config.seed))
    manifest = ScoresManifest(
        model=config.teacher,
        **how,
        block_size=block_size,
        seed=config.seed,
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        sha256=digests,
    )
    write_manifest(config.out, manifest)
    return manifest


def measure_scores(
    config: ScoreConfig, folder: Path, shape: ExpertShape
) -> tuple[npt.NDArray[np.float32], ScoresSource]:
    """Measure atomic scores [L, E, N] on the text, and say how."""
    from laguna_serve.scripts.text.rows import read_rows
    from laguna_serve.scripts.training.pruning.scores import SCORES, score_atoms

    model, tokenizer = load_model(folder, THREADS)
    text = read_rows(config.text, tokenizer, config.length, config.tokens)
    say(f"{text.tokens} tokens of {config.text} in {len(text.rows)} rows")
    scores = score_atoms(model, shape, text.rows, SCORES[config.score], say)
    return scores, {
        "score": config.score,
        "text": text.source,
        "documents": text.documents,
        "rows": len(text.rows),
        "tokens": text.tokens,
    }


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"score_experts: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
