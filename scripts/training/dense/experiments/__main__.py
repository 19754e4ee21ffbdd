"""Where a dense student should start, how many logits it needs, and what it should be distilled on; on the toy family.

Four starts before and after stage 1; from the first one's blocks, on the same batches, stage 2 beside the teacher and
from stores of several K; stage 2 on plain text against conversations, with what becomes of the answers; tokens per
second of stage 2 with each, in turn. Writes experiments.json and experiments.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from laguna_serve.scripts.training.dense.experiments.config import ExperimentsConfig
from laguna_serve.scripts.training.dense.experiments.result import DenseExperiments, format_result, list_tables
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, hold_folder

EXAMPLES = """examples:
  python scripts/training/dense/experiments tests/toy/teacher --out out/dense
  python scripts/training/dense/experiments tests/toy/teacher --out out/dense --stage2-steps 1200 --top-k 4,full

exit status: 0 measured, 2 it could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    prog = "scripts/training/dense/experiments"
    command = Command(prog, ExperimentsConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(argv, run_experiments, show=format_result)


def run_experiments(config: ExperimentsConfig) -> DenseExperiments:
    """Measure, and write the result beside the work folder. Raises CommandError."""
    from laguna_serve.scripts.training.dense.experiments.arms import run_arms
    from laguna_serve.serving.kit.signals import defer_signals

    check_out(config.out)
    with hold_folder(config.out):
        claim_folder(config.work, {**config.settings, "teacher": config.teacher}, alone=True)
        with defer_signals():
            result = run_arms(config)
        write_text(config.out / "experiments.json", json.dumps(to_json(result)) + "\n")
        write_text(config.out / "experiments.md", "\n\n".join(t.to_markdown() for t in list_tables(result)) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(main())
