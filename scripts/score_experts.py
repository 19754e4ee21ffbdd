"""Score the atoms of a Laguna's routed experts on text, and write the artefacts of structured pruning.

Written to --out, in the published formats (L sparse layers, E experts of N atoms, G groups of B atoms):

  atomic_scores.npy                      [L, E, N] float32     importance of each atom
  group_indices_importance_sorted.npy    [L, E, G, B] int64    each expert's atoms by falling score, in groups
  group_scores_importance_sorted.npy     [L, E, G] float32     sum of a group's scores
  group_keep_mask_{10,25,40}pct.npy      [L, E, G] bool        all but the lowest groups, at least one per expert
  group_keep_mask_random_{…}pct.npy      [L, E, G] bool        the control: as many groups, drawn at random
  summary.json, native_group_pruning_stats.md                  what the masks remove, per layer
  MANIFEST.json                          how they were made, and a SHA-256 of each

`laguna compact` makes a smaller checkpoint from a mask and the indices. The text should be the kind of text that the
model is for, and none that the result will be judged on.

Scores (scripts/training/pruning/scores.py has the formulas): loss, what removing an atom adds to the loss, to second
order; heapr, that of HEAPr; reap, of whole experts, and output: forward passes alone; magnitude: no text.

The model is read layer by layer from its shards, in bf16, fp16, fp32 or FP8 (128×128 blocks): at most three times its
largest layer is in memory, and one row of text, whatever the model's size; each layer's input lies in the work folder
(OUT/work), whose size --dry-run says. Interrupted? The same command continues with the layer that it was at.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from laguna_serve.plugins.pruning import ExpertShape, PruningError, read_shape
from laguna_serve.scripts.training.pruning.artefacts import (
    ScoresManifest,
    ScoresSource,
    choose_block_size,
    make_artefacts,
    read_scores,
    write_artefacts,
    write_manifest,
)
from laguna_serve.scripts.training.pruning.plan import ScoringPlan
from laguna_serve.scripts.training.pruning.summary import summarise, write_summary
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import CONTINUES, HELD, print_result, run_command
from laguna_serve.serving.kit.files import hash_file
from laguna_serve.serving.kit.flags import (
    MOST_SEED,
    MOST_TEXT,
    MOST_THREADS,
    Flag,
    FlagError,
    check_bounds,
    read_flags_and_json,
)
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.run_dir import RunDirError, check_out, hold_folders

if TYPE_CHECKING:
    from laguna_serve.scripts.training.pruning.measurement import Measured, Measurement

EXAMPLES = """examples:
  python scripts/score_experts.py tests/toy/teacher --out tests/toy/masks          the toy family's (one minute)
  python scripts/score_experts.py MODEL --text code.jsonl --block-size 64 --out DIR
  python scripts/score_experts.py MODEL --score heapr --text chunks.npy --device cuda --dtype bfloat16 --out DIR
  python scripts/score_experts.py MODEL --text conversations.jsonl --out DIR --dry-run    what it would take
  python scripts/score_experts.py MODEL --atomic-scores theirs.npy --out DIR       somebody else's scores

exit status: 0 written, 2 it could not run, 130 interrupted
"""

# What decides how scores are measured, and means nothing where they are given.
MEASURING = ("text", "tokens", "length", "score", "device", "dtype", "threads", "work")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Whose atoms to score, and on what."""

    teacher: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", positional=True)
    ]
    out: Annotated[Path, Flag("folder for the artefacts")]
    text: Annotated[
        str,
        Flag(
            "calibration text: .txt, .jsonl with text, prompt or messages, token ids as chunks.npy, or toy:training"
            " (default)",
            old=("--prompts",),
        ),
    ] = "toy:training"
    tokens: Annotated[int, Flag("about how many tokens to read (default 98304)", at_least=1, at_most=MOST_TEXT)] = (
        98_304
    )
    length: Annotated[int | None, Flag("tokens in a row at most (default 384; of a .npy, its own rows)")] = None
    score: Annotated[
        Literal["loss", "heapr", "output", "reap", "magnitude"],
        Flag("see training/pruning/scores.py (default loss)"),
    ] = "loss"
    atomic_scores: Annotated[Path | None, Flag("take these scores [L, E, N] and read no text")] = None
    block_size: Annotated[int | None, Flag("atoms in a group (default: an eighth of an expert)")] = None
    seed: Annotated[int, Flag("of the random controls (default 0)", at_least=0, at_most=MOST_SEED)] = 0
    device: Annotated[Literal["cpu", "cuda"], Flag("where it is computed (default cpu)")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], Flag("in which it is computed (default float32)")] = "float32"
    threads: Annotated[
        int, Flag("on a CPU (default 1: with more, sums differ from run to run)", at_least=1, at_most=MOST_THREADS)
    ] = 1
    work: Annotated[Path | None, Flag("folder for activations and gradients (default: OUT/work)")] = None
    dry_run: Annotated[bool, Flag("say what memory and disk it takes, and stop")] = False

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if self.dry_run and self.atomic_scores is not None:
            raise FlagError("--dry-run: expected scores to measure, got --atomic-scores; leave one of them out")
        given = next((name for name in MEASURING if getattr(self, name) != getattr(type(self), name)), None)
        if self.atomic_scores is not None and given is not None:
            raise FlagError(f"--{given}: expected none beside --atomic-scores, which are not measured; leave one out")

    @property
    def work_folder(self) -> Path:
        """Where activations and gradients lie."""
        return self.work if self.work is not None else self.out / "work"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        ScoreConfig, argv, prog="scripts/score_experts.py", description=__doc__, epilog=EXAMPLES
    )

    def body() -> int:
        if config.dry_run:
            plan = plan_scoring(config)
            print_result(plan.describe(), to_json(plan), None, always_json=always_json)
            return HELD
        manifest = score_experts(config)
        line = {"out": str(config.out), **to_json(manifest)}
        print_result(f"groups of {manifest.block_size} atoms", line, config.out, always_json=always_json)
        return HELD

    return run_command("score_experts.py", body, others=(PruningError,), interrupted=CONTINUES)


def plan_scoring(config: ScoreConfig) -> ScoringPlan:
    """Say what scoring takes, from headers and the text alone.

    Raises:
        CheckpointError, PruningError: teacher, text or block size cannot be used.
    """
    folder = require_folder(config.teacher)
    shape = read_shape(read_config(folder), config.teacher)
    choose_block_size(config.block_size, shape)
    return open_measurement(config, folder, shape).plan


def score_experts(config: ScoreConfig) -> ScoresManifest:
    """Score, group and rank; write the artefacts and their manifest.

    Raises:
        CheckpointError, PruningError: teacher, text, scores or block size cannot be used.
        RunDirError: the work folder is another measurement's. CommandError: not enough disk, or no such device.
    """
    check_out(config.out)
    folder = require_folder(config.teacher)
    if config.out.resolve() == folder.resolve():
        expected = "expected a folder for the artefacts, got the model's, of which they would become part"
        raise RunDirError(f"--out {config.out}: {expected}; choose another")
    shape = read_shape(read_config(folder), config.teacher)
    block_size = choose_block_size(config.block_size, shape)
    with hold_folders(config.out, *(() if config.atomic_scores is not None else (config.work_folder,))):
        return _score(config, folder, shape, block_size)


def _score(config: ScoreConfig, folder: Path, shape: ExpertShape, block_size: int) -> ScoresManifest:
    """Score, group, rank and write, alone in the folders."""
    measured: Measured | None = None
    if config.atomic_scores is not None:
        scores = read_scores(config.atomic_scores, shape)
        how: ScoresSource = {"score": str(config.atomic_scores), "scores_sha256": hash_file(config.atomic_scores)}
    else:
        measured = measure_scores(config, folder, shape)
        scores, how = measured.scores(config.score), measured.source(config.score)
    files = make_artefacts(scores, block_size, config.seed)
    digests = write_artefacts(config.out, files)
    routed = None if measured is None else measured.routed
    write_summary(config.out, summarise(config.teacher, how["score"], shape, files, how.get("loss"), routed))
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


def measure_scores(config: ScoreConfig, folder: Path, shape: ExpertShape) -> Measured:
    """Pass over the text, or go on with it; the sums stay in the work folder."""
    measurement = open_measurement(config, folder, shape)
    plan = measurement.plan
    if plan.rows:
        say(f"{plan.tokens} tokens of {config.text} in {plan.rows} rows")
    say(plan.describe())
    return measurement.run(config.work_folder)


def open_measurement(config: ScoreConfig, folder: Path, shape: ExpertShape) -> Measurement:
    """Read the headers and the text."""
    from laguna_serve.scripts.training.pruning.measurement import open_measurement

    return open_measurement(
        folder,
        shape,
        score=config.score,
        text=config.text,
        length=config.length,
        tokens=config.tokens,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
    )


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"score_experts: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
