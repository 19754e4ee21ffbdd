"""How much held-out loss does pruning cost? Ranked masks against random ones of the same size.

Both kinds prune the same number of groups of the same indices and keep at least one group of every expert; the pruned
atoms are zeroed in place in transformers' Laguna, in fp32. Writes curve.json, curve.md and curve.png to --out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from laguna_serve.plugins.pruning import ExpertShape, Pruning, PruningError, draw_random_mask, read_pruning, read_shape
from laguna_serve.scripts.training.pruning.artefacts import RATIOS
from laguna_serve.scripts.training.pruning.curve import CurveModel, CurvePoint, CurveResult, CurveText, format_table
from laguna_serve.scripts.training.pruning.teacher import load_model
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import HELD, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import hash_file, write_text
from laguna_serve.serving.kit.flags import MOST_TEXT, BoundedConfig, Flag, read_flags_and_json
from laguna_serve.serving.kit.results import to_json, write_indented
from laguna_serve.serving.kit.run_dir import check_out

if TYPE_CHECKING:
    from laguna_serve.scripts.text.rows import TextRows

THREADS = 2  # forward passes alone come out the same every time
INDICES = "group_indices_importance_sorted.npy"
EXAMPLES = """examples:
  python scripts/pruning_curve.py tests/toy/teacher --masks tests/toy/masks --out bench/results/toy-pruning-loss
  python scripts/pruning_curve.py MODEL --masks DIR --text held-out.jsonl --seeds 10 --out DIR
"""


@dataclass(frozen=True, kw_only=True)
class CurveConfig(BoundedConfig):
    """Whose experts to prune by which masks, and what to measure the loss on."""

    teacher: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", positional=True)
    ]
    masks: Annotated[Path, Flag("folder that score_experts.py wrote")]
    text: Annotated[
        str, Flag("to measure on: .txt, .jsonl with text, prompt or messages, chunks.npy, or toy:held-out (default)")
    ] = "toy:held-out"
    tokens: Annotated[int, Flag("about how many tokens (default 65536)", at_most=MOST_TEXT)] = 65_536
    length: Annotated[int, Flag("tokens in a row at most (default 384)")] = 384
    seeds: Annotated[int, Flag("random masks per size, at least 2 (default 5)", at_least=2)] = 5
    out: Annotated[Path, Flag("folder for curve.json, curve.md and curve.png")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        CurveConfig, argv, prog="scripts/pruning_curve.py", description=__doc__, epilog=EXAMPLES
    )
    return run_command("pruning_curve.py", lambda: run(config, always_json), others=(PruningError,))


def run(config: CurveConfig, always_json: bool) -> int:
    """Measure, write the files and print the result. Returns the exit status."""
    from laguna_serve.scripts.training.pruning.plot import draw_curve

    result = measure_curve(config)
    config.out.mkdir(parents=True, exist_ok=True)
    write_indented(config.out / "curve.json", result)
    write_text(config.out / "curve.md", format_table(result))
    draw_curve(result, config.out / "curve.png")
    print_result(format_table(result), to_json(result), config.out, always_json=always_json)
    return HELD


def measure_curve(config: CurveConfig) -> CurveResult:
    """Every loss: unpruned, ranked, and random per seed.

    Raises:
        CheckpointError, PruningError: teacher, masks or text cannot be used.
    """
    from laguna_serve.scripts.text.rows import read_rows

    check_out(config.out)
    folder = require_folder(config.teacher)
    shape = read_shape(read_config(folder), config.teacher)
    masks = {ratio: config.masks / f"group_keep_mask_{ratio * 100:.0f}pct.npy" for ratio in RATIOS}
    ranked = {ratio: read_pruning(path, config.masks / INDICES, shape) for ratio, path in masks.items()}
    draws = {r: draw_controls(ranked[r], shape, r, config.seeds, str(path)) for r, path in masks.items()}
    model, tokenizer = load_model(folder, THREADS)
    text = read_rows(config.text, tokenizer, config.length, config.tokens)
    meter = Meter(model, shape, text, 1 + len(RATIOS) * (1 + config.seeds))
    unpruned = meter.measure("unpruned", None)
    points = [
        CurvePoint(
            ratio=ratio,
            pruned_groups=pruning.pruned_blocks,
            groups=int(pruning.keep.size),
            ranked=meter.measure(f"ranked {ratio:.0%}", pruning),
            random=tuple(meter.measure(f"random {ratio:.0%}, seed {i}", mask) for i, mask in enumerate(draws[ratio])),
            ranked_mask_sha256=hash_file(masks[ratio]),
        )
        for ratio, pruning in ranked.items()
    ]
    return CurveResult(
        environment=read_environment(current_argv()),
        model=CurveModel(name=config.teacher, indices_sha256=hash_file(config.masks / INDICES)),
        text=CurveText(source=text.source, documents=text.documents, rows=len(text.rows), targets=text.targets),
        unpruned=unpruned,
        points=tuple(points),
    )


class Meter:
    """Measures losses of one model on one text, and says how far it is."""

    def __init__(self, model: Any, shape: ExpertShape, text: TextRows, count: int) -> None:
        self.model, self.shape, self.text, self.count = model, shape, text, count
        self.done, self.started = 0, time.monotonic()

    def measure(self, label: str, pruning: Pruning | None) -> float:
        """Mean loss with that pruning, in nats."""
        from laguna_serve.scripts.training.pruning.losses import mean_loss, zeroed

        with zeroed(self.model, self.shape, pruning) if pruning is not None else nullcontext():
            loss = mean_loss(self.model, self.text.rows, self.text.scored)
        self.done += 1
        left_s = (time.monotonic() - self.started) / self.done * (self.count - self.done)
        print(f"pruning_curve: {label}: {loss:.4f} nats; {left_s:.0f} s left", file=sys.stderr, flush=True)
        return loss


def draw_controls(ranked: Pruning, shape: ExpertShape, ratio: float, seeds: int, name: str) -> list[Pruning]:
    """Random masks of the same size over the same groups. Raises PruningError if the sizes would differ."""
    keeps = [draw_random_mask(shape, ranked.blocks_per_expert, ratio, seed) for seed in range(seeds)]
    expected = int((~keeps[0]).sum())
    if expected != ranked.pruned_blocks:
        raise PruningError(f"{name}: expected {expected} pruned groups, got {ranked.pruned_blocks}; rank it again")
    return [Pruning(keep, ranked.indices) for keep in keeps]


if __name__ == "__main__":
    sys.exit(main())
