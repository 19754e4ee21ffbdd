"""What does pruning add to a Laguna's loss? Ranked masks against random ones of the same size, on vLLM engines.

For every share of the groups and every mask `laguna compact` makes the pruned checkpoint, an engine serves it, and its
loss on held-out text is measured as loss.py does, on the same rows for all. Random masks prune as many of the same
groups, and like ranked ones keep a group of every expert. Intervals of differences are paired by document.

DIR gets pruning_loss.json, .md and .png, and keeps the losses of every model, so that the same command continues, and
one with more --shares or --seeds measures what is missing; the last stdout line is one JSON object (schema
laguna_serve.pruning_loss_endpoint/1). scripts/pruning_curve.py draws the curve by transformers: no engine, faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.evals.perplexity.pruning import PruningConfig, measure_pruning
from laguna_serve.evals.perplexity.pruning_report import PruningResult, render_text
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command

__all__ = ["PruningConfig", "PruningResult", "main", "measure_pruning"]

EXAMPLES = """
examples:
  python evals/pruning_loss.py --model tests/toy/teacher --out out/pruning-loss
  python evals/pruning_loss.py --model M --masks DIR --text held-out.jsonl --dtype bfloat16 --length 2048 --out out/p

exit status:
  0    held: at every share the ranked mask costs less than random ones do on average
  1    fell short: at some share it does not
  2    could not run: bad input, or an engine did not start or died
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("evals/pruning_loss.py", PruningConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(
        argv,
        measure_pruning,
        show=render_text,
        judge=lambda result: HELD if all(point.ranked_is_better for point in result.points) else FELL_SHORT,
    )


if __name__ == "__main__":
    raise SystemExit(main())
