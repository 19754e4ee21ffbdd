"""Teach a student what is in a cache: DANTE's losses on TRL's SFTTrainer and Accelerate.

Rows are sorted from easy to hard, once; every epoch goes through them again. Weights and optimiser are float32, and
--precision bfloat16 computes in bfloat16 over them: in bfloat16 weights a step of this learning rate is mostly rounded
away. Writes the student, with training.json, curves and a model card, to --out. The state is saved on the way: the
same command continues.

It needs .venv-train, which `bash scripts/client_env.sh train` makes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from laguna_serve.scripts.checkpoints.output import check_own
from laguna_serve.scripts.dante.options import DanteConfig, DanteResult
from laguna_serve.scripts.training.dante.loading import quieten_libraries
from laguna_serve.scripts.training.dante.losses import confidence_weight
from laguna_serve.scripts.training.dante.records import read_cache
from laguna_serve.scripts.training.dante.rows import (
    TaughtRows,
    draw_records,
    encode_records,
    order_records,
)
from laguna_serve.scripts.training.devices import require_device
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.serving.checkpoint.folder import find_folder
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_work, fingerprint, hold_folders, is_begun
from laguna_serve.serving.kit.signals import defer_signals
from laguna_serve.serving.kit.tables import Table

if TYPE_CHECKING:
    from laguna_serve.scripts.dante.run import Run

RESULT = "training.json"
EXAMPLES = """examples:
  .venv-train/bin/python scripts/dante train MODEL --cache out/cache --out out/student
  .venv-train/bin/accelerate launch --num_processes 8 scripts/dante/train.py MODEL --cache DIR --device cuda --out DIR
  .venv-train/bin/accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
    --num_processes 8 scripts/dante/train.py MODEL --cache DIR --device cuda --out DIR                   in parts
  .venv-train/bin/python scripts/dante train MODEL --cache DIR --plain --curriculum none --out DIR     plain fine-tuning

exit status: 0 trained, 2 it could not run, 130 interrupted (the same command continues)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # one process of several speaks
    command = Command(
        "scripts/dante train",
        DanteConfig,
        __doc__,
        EXAMPLES,
        interrupted="the same command continues after the last whole step",
    )
    return command.run(argv, train_student, show=format_training, line=Brief(counted=("log",)))


def require_trainer() -> None:
    """Make ready for TRL. Raises CommandError where it is not installed."""
    if importlib.util.find_spec("trl") is None:
        remedy = "run bash scripts/client_env.sh train, then this with .venv-train/bin/python"
        raise CommandError(f"training: expected an environment with trl, got {sys.executable}; {remedy}")
    quieten_libraries()


def train_student(config: DanteConfig) -> DanteResult:
    """Train, write the student and training.json.

    Raises:
        CacheError: the cache cannot be used. CheckpointError: --out is another checkpoint.
        RunDirError: the work folder is another run's.
        CommandError: no TRL, no such model, or a batch that does not divide.
        KeyboardInterrupt: a signal came; the state is saved.
    """
    require_trainer()
    require_device(config.device)
    find_folder(str(config.model))  # a hub id is fetched
    check_out(config.out)
    work = config.work or config.out.with_name(f"{config.out.name}.work")
    check_own(config.out, [config.model], own=is_begun(work) or (config.out / RESULT).exists())
    from laguna_serve.scripts.dante.run import Run

    records = draw_records(read_cache(config.cache), config.share, config.seed)
    ordered = order_records(records, config.curriculum)
    run = Run(config, work)
    taught = encode_records(ordered, run.tokenizer, config.length, config.entropy_scale)
    run.count_rows(taught)
    # One process of several holds them for all.
    held = (config.out, work) if run.is_main else ()
    taken = count_minutes(work / MINUTES, lambda: run.is_main and is_begun(work))
    with hold_folders(*held), taken as minutes:
        if run.is_main:
            settings = {**config.decisive, "model": fingerprint(str(config.model))}
            claim_work(work, config.out, {**settings, "records": [msgspec.to_builtins(record) for record in ordered]})
        run.wait()  # the folder is there for all
        with defer_signals():
            run.train(taught)
        result = _describe(config, run, taught, minutes())
        run.wait()  # none reads its state any more
        if run.is_main:
            _write(config, run, result, sorted({record.teacher for record in records}))
            shutil.rmtree(work)
    run.wait()
    return result


def _write(config: DanteConfig, run: Run, result: DanteResult, teachers: list[str]) -> None:
    """Write the student, and beside it how it went."""
    from laguna_serve.scripts.dante.student_card import CURVES, describe_taught, write_curves
    from laguna_serve.scripts.training.card import write_card

    run.save()
    write_result(config.out / RESULT, result)
    write_curves(result, config.out / CURVES)
    write_card(describe_taught(result, teachers, config.out), config.out)


def _describe(config: DanteConfig, run: Run, taught: TaughtRows, minutes: float) -> DanteResult:
    """Put together how it went."""
    return DanteResult(
        environment=read_environment(current_argv()),
        model=str(config.model),
        out=str(config.out),
        objective={**config.decisive},
        rows=run.rows,
        cut=taught.cut,
        left_out=taught.left_out,
        steps=config.steps,
        batch=config.batch,
        processes=run.processes,
        epochs=round(config.steps * config.batch / run.rows, 3),
        weights=weigh_rows(taught, config),
        drift=run.drift,
        minutes=minutes,
        log=tuple(run.log),
    )


def weigh_rows(taught: TaughtRows, config: DanteConfig) -> tuple[float, float, float]:
    """Find least, mean and most weight of the rows."""
    if not config.weighs:
        return 1.0, 1.0, 1.0
    weights = confidence_weight(torch.tensor([row.entropy for row in taught.rows]), config.entropy_center)
    return round(float(weights.min()), 4), round(float(weights.mean()), 4), round(float(weights.max()), 4)


def format_training(result: DanteResult) -> str:
    """Format how it went as a table."""
    rows = [
        ("rows, of them without an end", f"{result.rows}, {result.cut}"),
        ("epochs", f"{result.epochs}"),
        *result.list_figures(),
        ("minutes", f"{result.minutes}"),
    ]
    return Table("lr", ("training", ""), rows).to_text()


if __name__ == "__main__":
    sys.exit(main())
