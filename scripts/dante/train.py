"""Teach a student what is in a cache: DANTE's losses on TRL's SFTTrainer and Accelerate.

Rows are sorted from easy to hard, once; every epoch goes through them again.  Weights and optimiser are float32, and
--precision bfloat16 computes in bfloat16 over them: in bfloat16 weights a step of this learning rate is mostly rounded
away.  Writes the student, with training.json, to --out.  The state is saved on the way: the same command continues.

It needs .venv-train, which `bash scripts/client_env.sh train` makes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from laguna_serve.scripts.training.dante.losses import CENTER, Anchor, confidence_weight
from laguna_serve.scripts.training.dante.records import read_cache
from laguna_serve.scripts.training.dante.rows import (
    Curriculum,
    EntropyScale,
    TaughtRows,
    draw_records,
    encode_records,
    order_records,
)
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint
from laguna_serve.serving.kit.signals import defer_signals
from laguna_serve.serving.kit.tables import Table

CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
EXAMPLES = """examples:
  .venv-train/bin/python scripts/dante train MODEL --cache out/cache --out out/student
  .venv-train/bin/accelerate launch --num_processes 8 scripts/dante/train.py MODEL --cache DIR --out DIR
  .venv-train/bin/python scripts/dante train MODEL --cache DIR --plain --curriculum none --out DIR     plain fine-tuning

exit status: 0 trained, 2 it could not run, 130 interrupted (the same command continues)
"""


@dataclass(frozen=True, kw_only=True)
class DanteConfig:
    """A student, a cache, and how the one learns the other."""

    model: Annotated[Path, Flag("the student's initialisation: a checkpoint's folder", positional=True)]
    cache: Annotated[Path, Flag("folder of scripts/dante cache, or one shard", metavar="DIR")]
    out: Annotated[Path, Flag("folder for the student", metavar="DIR")]
    work: Annotated[Path | None, Flag("training state (default: OUT with .work behind its name)", metavar="DIR")] = None
    steps: Annotated[int, Flag("default 2000", at_least=1)] = 2000
    warm_up: Annotated[int | None, Flag("steps (default: a tenth)", metavar="N", at_least=0)] = None
    batch: Annotated[int, Flag("rows of a step, over all processes (default 128)", at_least=1)] = 128
    micro_batch: Annotated[
        int | None, Flag("rows at once in a process (default: all of its part)", metavar="N", at_least=1)
    ] = None
    length: Annotated[int, Flag("tokens of a row at most (default 4096)", at_least=16)] = 4096
    lr: Annotated[float, Flag("peak (default 2e-5), cosine after the warm-up")] = 2e-5
    share: Annotated[float, Flag("of the records, drawn by --seed (default 1)")] = 1.0
    curriculum: Annotated[Curriculum, Flag("what rows are sorted by; none shuffles (default output_entropy)")] = (
        "output_entropy"
    )
    plain: Annotated[bool, Flag("plain fine-tuning: no weights, no anchor, no λ", group="the objective")] = False
    no_weights: Annotated[bool, Flag("leave CWCE out")] = False
    anchor: Annotated[Anchor, Flag("TEA: over the initialisation's norm, as printed, or none")] = "relative"
    entropy_scale: Annotated[EntropyScale, Flag("what CWCE weighs by: as measured, or ranks spread over 0 to 3")] = (
        "nats"
    )
    entropy_center: Annotated[float, Flag(f"where the weight is half-way (default {CENTER})", metavar="H")] = CENTER
    precision: Annotated[Literal["float32", "bfloat16"], Flag("what is computed in", group="the machine")] = "float32"
    checkpointing: Annotated[bool, Flag("activation checkpointing: less memory, a third more work")] = False
    device: Annotated[Literal["cpu", "cuda"], Flag("where (default cpu)")] = "cpu"
    threads: Annotated[int, Flag("of the processor, of each process (default 1)", at_least=1)] = 1
    save_every: Annotated[int, Flag("steps between saved states (default 200)", metavar="N", at_least=1)] = 200
    seed: Annotated[int, Flag("default 42", at_least=0)] = 42

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if not 0 < self.lr < 1:
            raise FlagError(f"--lr: expected a rate between 0 and 1, got {self.lr}")
        if not 0 < self.share <= 1:
            raise FlagError(f"--share: expected more than 0 and at most 1, got {self.share}")

    @property
    def warm_up_steps(self) -> int:
        """Steps in which the rate rises and λ_CE is held."""
        return self.steps // 10 if self.warm_up is None else self.warm_up

    @property
    def weighs(self) -> bool:
        """Whether CWCE is on."""
        return not (self.plain or self.no_weights)

    @property
    def anchored(self) -> Anchor:
        """Which TEA is on."""
        return "none" if self.plain else self.anchor

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides about the student; how many processes share a step does not."""
        machine = ("model", "cache", "out", "work", "micro_batch", "device", "threads", "save_every", "checkpointing")
        return {name: value for name, value in asdict(self).items() if name not in machine}


class DanteStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step: the total loss, the mean cross entropy, the mean weight, the embedding's relative drift before it."""

    step: int
    loss: float
    cross_entropy: float
    weight: float
    drift: float
    grad_norm: float
    lr: float


class DanteResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dante_training/1"):
    """What was taught, and how it went.

    Attributes:
        rows: taught in an epoch; `cut` of the encoded rows do not teach where to stop, `left_out` had no room.
        epochs: how often the curriculum starts again.
        weights: least, mean and most w(H) of the rows: a spread near 0 makes CWCE a constant.
        drift: of the embedding after the last step: squared, over the initialisation's norm.
    """

    environment: Environment
    model: str
    out: str
    objective: dict[str, str | float | bool]
    rows: int
    cut: int
    left_out: int
    steps: int
    batch: int
    processes: int
    epochs: float
    weights: tuple[float, float, float]
    drift: float
    minutes: float
    log: tuple[DanteStep, ...]


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
    """Raise CommandError where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        remedy = "run bash scripts/client_env.sh train, then this with .venv-train/bin/python"
        raise CommandError(f"training: expected an environment with trl, got {sys.executable}; {remedy}")


def train_student(config: DanteConfig) -> DanteResult:
    """Train, write the student and training.json.

    Raises:
        CacheError: the cache cannot be used. RunDirError: the work folder is another run's.
        CommandError: no TRL, no such model, or a batch that does not divide.
        KeyboardInterrupt: a signal came; the state is saved.
    """
    require_trainer()
    check_out(config.out)
    from laguna_serve.scripts.dante.run import Run

    began = time.monotonic()
    records = draw_records(read_cache(config.cache), config.share, config.seed)
    ordered = order_records(records, config.curriculum)
    work = config.work or config.out.with_name(f"{config.out.name}.work")
    run = Run(config, work)
    if run.is_main:
        texts = [[record.teacher_text, record.output_entropy] for record in ordered]
        claim_folder(work, {**config.decisive, "model": fingerprint(str(config.model)), "records": texts})
    taught = encode_records(ordered, run.tokenizer, config.length, config.entropy_scale)
    with defer_signals():
        run.train(taught)
    weights = weigh_rows(taught, config)
    result = DanteResult(
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
        weights=weights,
        drift=run.drift,
        minutes=round((time.monotonic() - began) / 60, 2),
        log=tuple(run.log),
    )
    if run.is_main:
        run.save()
        write_result(config.out / "training.json", result)
        shutil.rmtree(work)
    run.wait()
    return result


def weigh_rows(taught: TaughtRows, config: DanteConfig) -> tuple[float, float, float]:
    """Find least, mean and most weight of the rows."""
    if not config.weighs:
        return 1.0, 1.0, 1.0
    weights = confidence_weight(torch.tensor([row.entropy for row in taught.rows]), config.entropy_center)
    return round(float(weights.min()), 4), round(float(weights.mean()), 4), round(float(weights.max()), 4)


def format_training(result: DanteResult) -> str:
    """Format how it went as a table."""
    first, last = result.log[0], result.log[-1]
    least, mean, most = result.weights
    rows = [
        ("rows, of them without an end", f"{result.rows}, {result.cut}"),
        ("epochs", f"{result.epochs}"),
        ("w(H): least, mean, most", f"{least:.3f}, {mean:.3f}, {most:.3f}"),
        ("cross entropy, first and last step", f"{first.cross_entropy:.3f}, {last.cross_entropy:.3f} nats"),
        ("drift of the embedding", f"{result.drift:.2e}"),
        ("minutes", f"{result.minutes}"),
    ]
    return Table("lr", ("training", ""), rows).to_text()


if __name__ == "__main__":
    sys.exit(main())
