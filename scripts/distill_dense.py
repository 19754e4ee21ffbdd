"""Distil a Laguna mixture of experts into a dense student of the same cost per token.

Stage 1 trains every dense block on its own against its sparse block, stage 2 the whole student against the teacher's
logits on conversations (scripts/training/dense/stages.py). The checkpoint is stock Laguna, narrower layers padded with
zeros; `laguna serve` loads it at its true widths and `laguna unpad` stores it so. Writes to --report what was
measured: distillation.json, stage1_nmse.png, stage2_kl.png and, with --curve-every, stage2_held_out.png; a model card
lies beside the checkpoint.

With --store stage 2 learns from the teacher's top-K logits, which are written to disk first; with --layerwise the
teacher's shards are read a layer at a time. With both it never lies whole in memory, and `torchrun` shares stage 1's
layers and stage 2's rows among processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.report.result import (
    DistillResult,
    format_measured,
    write_manifest,
    write_report,
)
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.kit.cli import HELD, print_result, run_command
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.results import to_json

__all__ = ["DistillConfig", "DistillResult", "main"]

EXAMPLES = """examples:
  the toy family's student (about 20 minutes on two cores):
    python scripts/distill_dense.py tests/toy/teacher --out tests/toy/dense --width 0=672 --width 3=613 \\
        --report bench/results/toy-distillation
  another teacher, own text:
    python scripts/distill_dense.py TEACHER --text code.jsonl --chats instructions.jsonl --length 2048 \\
        --stage1-steps 20000 --stage2-steps 5000 --out student
  what would it take?
    python scripts/distill_dense.py TEACHER --length 2048 --store logits --layerwise --weights bfloat16 \\
        --checkpointing --accumulate 6 --logit-chunk 1024 --out student --dry-run
  a teacher that does not fit, on eight devices:
    torchrun --nproc-per-node 8 scripts/distill_dense.py TEACHER --layerwise --store logits --top-k 32 --rows 64 …
  the store from a server (`laguna serve TEACHER -- --max-logprobs 32`):
    python scripts/distill_dense.py TEACHER --store logits --endpoint http://host:8000 --only-store --out student

Stopped?  The same command continues from the last saved step.  Trains on a CUDA device where there is one.
exit status: 0 done, 2 it could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        DistillConfig, argv, prog="scripts/distill_dense.py", description=__doc__, epilog=EXAMPLES
    )
    interrupted = "the same command continues from the last saved step"
    return run_command("distill_dense.py", lambda: run(config, always_json), interrupted=interrupted)


def run(config: DistillConfig, always_json: bool) -> int:
    """Distil, write the report and print the result without its logs. Returns the exit status."""
    if config.dry_run:
        from laguna_serve.scripts.training.dense.plan.page import format_plan, plan_memory

        plan = plan_memory(config, require_folder(config.teacher, config_alone=True))
        print_result(format_plan(plan), to_json(plan), None, always_json=always_json)
        return HELD
    from laguna_serve.scripts.training.card import write_card
    from laguna_serve.scripts.training.dense.report.card import describe_student
    from laguna_serve.scripts.training.dense.run import distil
    from laguna_serve.scripts.training.ranks import open_ranks

    with open_ranks() as ranks:
        result = distil(config, ranks)
    if result is not None:
        write_report(result, config.report or config.out)
        write_manifest(result, config.out)
        write_card(describe_student(result, config.out), config.out)
        line = {key: value for key, value in to_json(result).items() if key != "logs"}
        print_result(format_measured(result), line, config.out, always_json=always_json)
    return HELD


if __name__ == "__main__":
    sys.exit(main())
