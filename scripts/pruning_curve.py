"""How much held-out loss does pruning cost?  Ranked masks against random ones of the same size.

Both kinds prune the same number of groups of the same indices and keep at least one group of every expert; the pruned
atoms are zeroed in place in transformers' Laguna, in fp32.  Writes curve.json, curve.md and curve.png to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from laguna_serve.plugins.pruning import ExpertShape, Pruning, PruningError, draw_random_mask, read_pruning, read_shape
from laguna_serve.scripts.score_experts import RATIOS, hash_file, load_model
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import Parser, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment

SCHEMA = "laguna_serve.pruning_loss/1"
THREADS = 2  # forward passes alone come out the same every time
INDICES = "group_indices_importance_sorted.npy"
EXAMPLES = """examples:
  python scripts/pruning_curve.py tests/toy/teacher --masks tests/toy/masks --out bench/results/toy-pruning-loss
  python scripts/pruning_curve.py MODEL --masks DIR --text held-out.jsonl --seeds 10 --out DIR
"""


class Meter:
    """Measures losses of one model on one text, and says how far it is."""

    def __init__(self, model: Any, shape: ExpertShape, rows: list[Any], count: int) -> None:
        self.model, self.shape, self.rows, self.count = model, shape, rows, count
        self.done, self.started = 0, time.monotonic()

    def measure(self, label: str, pruning: Pruning | None) -> float:
        """Mean loss with that pruning, in nats."""
        from laguna_serve.scripts.training.pruning.losses import mean_loss, zeroed

        with zeroed(self.model, self.shape, pruning) if pruning is not None else nullcontext():
            loss = mean_loss(self.model, self.rows)
        self.done += 1
        left_s = (time.monotonic() - self.started) / self.done * (self.count - self.done)
        print(f"pruning_curve: {label}: {loss:.4f} nats; {left_s:.0f} s left", file=sys.stderr, flush=True)
        return loss


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every loss: unpruned, ranked, and random per seed."""
    from laguna_serve.scripts.text.rows import read_rows

    shape = read_shape(read_config(folder), args.teacher)
    masks = {ratio: args.masks / f"group_keep_mask_{ratio * 100:.0f}pct.npy" for ratio in RATIOS}
    ranked = {ratio: read_pruning(path, args.masks / INDICES, shape) for ratio, path in masks.items()}
    draws = {ratio: draw_controls(ranked[ratio], shape, ratio, args.seeds, str(path)) for ratio, path in masks.items()}
    model, tokenizer = load_model(folder, THREADS)
    text = read_rows(args.text, tokenizer, args.length, args.tokens)
    meter = Meter(model, shape, text.rows, 1 + len(RATIOS) * (1 + args.seeds))
    unpruned = meter.measure("unpruned", None)
    points = [
        {
            "ratio": ratio,
            "pruned_groups": pruning.pruned_blocks,
            "groups": int(pruning.keep.size),
            "ranked": meter.measure(f"ranked {ratio:.0%}", pruning),
            "random": [meter.measure(f"random {ratio:.0%}, seed {i}", draw) for i, draw in enumerate(draws[ratio])],
            "ranked_mask_sha256": hash_file(masks[ratio]),
        }
        for ratio, pruning in ranked.items()
    ]
    read = {"source": text.source, "documents": text.documents, "rows": len(text.rows), "targets": text.targets}
    return {"text": read, "unpruned": unpruned, "points": points}


def draw_controls(ranked: Pruning, shape: ExpertShape, ratio: float, seeds: int, name: str) -> list[Pruning]:
    """Random masks of the same size over the same groups.  Raises PruningError if the sizes would differ."""
    keeps = [draw_random_mask(shape, ranked.blocks_per_expert, ratio, seed) for seed in range(seeds)]
    expected = int((~keeps[0]).sum())
    if expected != ranked.pruned_blocks:
        raise PruningError(f"{name}: expected {expected} pruned groups, got {ranked.pruned_blocks}; rank it again")
    return [Pruning(keep, ranked.indices) for keep in keeps]


def format_table(result: dict[str, Any]) -> str:
    """The Markdown page."""
    base, text, environment = result["unpruned"], result["text"], result["environment"]
    lines = [
        "# Held-out loss of the pruned toy teacher" if text["source"] == "toy:held-out" else "# Held-out loss, pruned",
        "",
        "| groups pruned | ranked, nats | Δ | random, mean ± s.d. | Δ | random, least to most | ranked Δ ÷ random Δ |",
        "|---|---|---|---|---|---|---|",
        f"| 0% | {base:.4f} | | {base:.4f} | | | |",
    ]
    for point in result["points"]:
        mean, spread = statistics.mean(point["random"]), statistics.stdev(point["random"])
        ranked_delta, random_delta = point["ranked"] - base, mean - base
        share = f"{point['pruned_groups']} of {point['groups']} ({point['ratio']:.0%})"
        lines.append(
            f"| {share} | {point['ranked']:.4f} | {ranked_delta:+.4f} | {mean:.4f} ± {spread:.4f} "
            f"| {random_delta:+.4f} | {min(point['random']):.4f} to {max(point['random']):.4f} "
            f"| {ranked_delta / random_delta:.2f} |"
        )
    unseen = ", which neither training nor calibration saw" if text["source"] == "toy:held-out" else ""
    seeds = len(result["points"][0]["random"])
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines += [
        "",
        f"Mean next-token loss over {text['targets']:,} tokens of {text['source']} ({text['documents']} documents,"
        f" {text['rows']} evenly spaced rows){unseen}. Random masks: {seeds} seeds, the same groups, as many pruned, at"
        " least one kept in every expert. fp32, pruned atoms zeroed in transformers.",
        "",
        f"`{environment['command']}` on {where}; Python {environment['python']}, {versions}.",
    ]
    return "\n".join(lines) + "\n"


def write_result(result: dict[str, Any], out: Path) -> None:
    """JSON, table and picture."""
    from laguna_serve.scripts.training.pruning.plot import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "curve.md").write_text(format_table(result), encoding="utf-8")
    draw(result, out / "curve.png")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("teacher", help="Laguna checkpoint: a folder, or a hub id that is in the local cache")
    parser.add_argument("--masks", type=Path, required=True, help="folder that score_experts.py wrote")
    text = "text to measure on: .txt, .jsonl with text or prompt, or toy:held-out (default)"
    parser.add_argument("--text", default="toy:held-out", help=text)
    parser.add_argument("--tokens", type=int, default=65_536, help="about how many tokens (default %(default)s)")
    parser.add_argument("--length", type=int, default=384, help="tokens in a row at most (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="random masks per size, at least 2 (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.json, curve.md and curve.png")
    return parser.parse_args()


def main() -> int:
    args = parse()
    folder = require_folder(args.teacher)
    if args.seeds < 2:
        raise PruningError(f"--seeds: expected at least 2, for a spread, got {args.seeds}; 5 are usual")
    measured = measure(args, folder)
    model = {"name": args.teacher, "indices_sha256": hash_file(args.masks / INDICES)}
    result = {"schema": SCHEMA, "environment": describe_environment(current_argv()), "model": model, **measured}
    write_result(result, args.out)
    print(format_table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("pruning_curve", main, others=(PruningError,), interrupted="nothing was written"))
