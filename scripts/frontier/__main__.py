"""Which score prunes best? Held-out loss against bytes for the masks of every score, and how far the scores agree.

Scores come from passes over random draws of the calibration text (one per seed). Masks are applied in memory, no
checkpoint is written, in the model's own format and in FP8 as `laguna compact --to fp8` stores it: groups by `loss`,
`heapr`, `output`, `magnitude` and `reap`, single atoms by two of them, whole experts as REAP takes them from the router
and as MoNE replaces them by constants, random groups, and the blocks of `heapr` routed to one by one. Differences are
paired by row and draw.

Writes frontier.json, frontier.md and pictures to --out. Every loss is noted as it is measured: the same command goes
on after an interruption, and with more --seeds measures what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.frontier.options import FrontierConfig
from laguna_serve.scripts.frontier.page import format_page, format_summary
from laguna_serve.scripts.frontier.result import FrontierResult
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, hold_folder

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

    with hold_folder(config.out):
        result = measure(config)
        write_result(config.out / "frontier.json", result)
        write_text(config.out / "frontier.md", format_page(result))
        draw_frontier(result, config.out / "frontier.png")
    return result


if __name__ == "__main__":
    sys.exit(main())
