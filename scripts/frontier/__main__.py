"""Which score prunes best?  Held-out loss against bytes for the masks of every score, and how far the scores agree.

Every score comes from one pass over the calibration text (or from the work folder of score_experts.py, which the same
flags continue).  Masks are applied in memory, no checkpoint is written: groups of every score, single atoms of `loss`
and `heapr`, and random groups.  Differences are paired by row.  Writes frontier.json and frontier.md to --out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import ExpertShape, Pruning, PruningError, draw_random_mask, rank_groups, read_shape
from laguna_serve.scripts.frontier.result import (
    FrontierPoint,
    FrontierResult,
    compare_rows,
    correlate,
    format_page,
)
from laguna_serve.scripts.training.pruning.artefacts import RATIOS, choose_block_size
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.checkpoint.weight_files import count_values
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, check_bounds
from laguna_serve.serving.kit.results import write_result

BF16_BYTES = 2
EXAMPLES = """
examples:
  python scripts/frontier --model tests/toy/teacher --out out/frontier
  python scripts/frontier --model M --calibration chunks.npy --text held-out.jsonl --out DIR

exit status:
  0    measured
  2    could not run: bad input
  130  interrupted: the same command continues with the scores' passes
"""


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Whose experts to prune by every score, and what to measure on."""

    model: Annotated[str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", metavar="M")]
    calibration: Annotated[str, Flag("text of the scores, as score_experts.py --text", metavar="TEXT")] = "toy:training"
    calibration_tokens: Annotated[int, Flag("default: 98304", metavar="N", at_least=1)] = 98_304
    text: Annotated[str, Flag("text of the losses (default: toy:held-out)", metavar="TEXT")] = "toy:held-out"
    tokens: Annotated[int, Flag("about how many tokens of it (default: 16384)", metavar="N", at_least=1)] = 16_384
    length: Annotated[int | None, Flag("tokens in a row at most (default: 384)", metavar="N")] = None
    block_size: Annotated[int | None, Flag("atoms in a group (default: an eighth of an expert)", metavar="N")] = None
    seeds: Annotated[int, Flag("random masks per share (default: 3)", metavar="N", at_least=1)] = 3
    out: Annotated[Path, Flag("folder for the result files and the scores' passes", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)


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
    return command.run(argv, measure_frontier, show=format_page)


def measure_frontier(config: FrontierConfig) -> FrontierResult:
    """Score, prune in memory and measure; write frontier.json and frontier.md.

    Raises:
        CheckpointError, PruningError, RunDirError: model, text or folder cannot be used.
    """
    folder = require_folder(config.model)
    shape = read_shape(read_config(folder), config.model)
    block_size = choose_block_size(config.block_size, shape)
    environment = read_environment(current_argv())
    from laguna_serve.scripts.training.pruning.measurement import open_measurement
    from laguna_serve.scripts.training.pruning.scores import SCORES

    measurement = open_measurement(
        folder,
        shape,
        score="loss",  # what it needs, all others need too
        text=config.calibration,
        length=config.length,
        tokens=config.calibration_tokens,
        device="cpu",
        dtype="float32",
        threads=1,
    )
    measured = measurement.run(config.out / "work")
    scores = {name: measured.scores(name) for name in SCORES}
    meter = Meter(config, folder, shape)
    base = meter.measure("unpruned", None)
    size, atom = BF16_BYTES * count_values(folder), BF16_BYTES * 3 * shape.hidden_size
    points = []
    for mask, ratio, pruning in list_masks(scores, shape, block_size, config.seeds):
        delta, low, high = compare_rows(meter.measure(f"{mask} {ratio:.0%}", pruning), base, meter.targets)
        left = size - pruning.pruned_blocks * pruning.block_size * atom
        points.append(FrontierPoint(mask=mask, ratio=ratio, bytes_bf16=left, delta=delta, low=low, high=high))
    result = FrontierResult(
        environment=environment,
        model=config.model,
        calibration_tokens=measured.text.tokens,
        text=config.text,
        rows=len(meter.targets),
        targets=int(meter.targets.sum()),
        unpruned=float(base.sum() / meter.targets.sum()),
        bytes_bf16=size,
        points=tuple(points),
        correlations=correlate(scores),
    )
    write_result(config.out / "frontier.json", result)
    write_text(config.out / "frontier.md", format_page(result))
    return result


def list_masks(
    scores: dict[str, npt.NDArray[np.float32]], shape: ExpertShape, block_size: int, seeds: int
) -> Iterator[tuple[str, float, Pruning]]:
    """(mask, ratio, pruning): groups of every score, atoms of two, random groups."""
    from laguna_serve.scripts.training.pruning.scores import group_atoms

    grouped = {name: group_atoms(values, block_size) for name, values in scores.items()}
    grouped |= {f"{name}-atoms": group_atoms(scores[name], 1) for name in ("loss", "heapr")}
    for ratio in RATIOS:
        for name, (indices, sums) in grouped.items():
            yield name, ratio, Pruning(rank_groups(sums, ratio), indices)
        indices = grouped["loss"][0]
        for seed in range(seeds):
            yield f"random-{seed}", ratio, Pruning(draw_random_mask(shape, indices.shape[2], ratio, seed), indices)


class Meter:
    """Measures each row's summed loss under a mask, and says how far it is."""

    def __init__(self, config: FrontierConfig, folder: Path, shape: ExpertShape) -> None:
        from laguna_serve.scripts.text.rows import read_rows
        from laguna_serve.scripts.training.pruning.teacher import load_model

        self._shape = shape
        self._model: Any
        self._model, tokenizer = load_model(folder, 1)
        self._text = read_rows(config.text, tokenizer, config.length, config.tokens)
        self.targets = np.array([int(scored.sum()) for scored in self._text.scored])

    def measure(self, label: str, pruning: Pruning | None) -> npt.NDArray[np.float64]:
        """[R]: summed loss of each row, in nats."""
        from laguna_serve.scripts.training.pruning.losses import mean_loss, zeroed

        began = time.monotonic()
        with zeroed(self._model, self._shape, pruning) if pruning is not None else nullcontext():
            rows = zip(self._text.rows, self._text.scored, strict=True)
            means = np.array([mean_loss(self._model, [row], [scored]) for row, scored in rows])
        nats: npt.NDArray[np.float64] = means * self.targets
        took = f"{time.monotonic() - began:.0f} s"
        print(f"frontier: {label}: {nats.sum() / self.targets.sum():.4f} nats; {took}", file=sys.stderr)
        return nats


if __name__ == "__main__":
    sys.exit(main())
