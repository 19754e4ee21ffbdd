"""Teach a smaller LLaDA, as prune.py makes it, what the whole one chooses at masked positions.

Loss and mask ratios are the 24-layer draft's (distillation.py). The text is cut into rows of --length tokens, shorter
ones are left out. The student learns in float32, which with its gradients and AdamW's two moments is 16 bytes a
parameter; the teacher computes in --dtype. The state is saved on the way: the same command continues.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch

from laguna_serve.plugins.diffusion.checkpoint import read_config
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import load_model, require_device
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.checkpoints.output import check_own
from laguna_serve.scripts.text.rows import read_rows
from laguna_serve.scripts.training.diffusion.ablation import RATIOS
from laguna_serve.scripts.training.diffusion.distillation import Direction, distil, measure_agreement
from laguna_serve.scripts.training.diffusion.saving import write_checkpoint
from laguna_serve.scripts.training.loop import Schedule
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_indented
from laguna_serve.serving.kit.run_dir import check_out, claim_work, fingerprint, hold_folders, is_begun
from laguna_serve.serving.kit.signals import defer_signals

EXAMPLES = """examples:
  python scripts/training/diffusion/distil.py tests/toy/llada out/pruned --steps 300 --out out/draft
  python scripts/training/diffusion/distil.py LLADA-8B PRUNED --text text.jsonl --device cuda --dtype bfloat16 --out DIR

exit status: 0 done, 2 it could not run, 130 interrupted (the same command continues)
"""
RESULT = "distillation.json"
HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """A teacher, a student, and text to learn from.

    Attributes:
        text: as in scripts/text/rows.py; its last rows are held out.
    """

    model: Annotated[Path, Flag("the teacher, a LLaDA checkpoint: a folder", positional=True)]
    student: Annotated[Path, Flag("the smaller LLaDA that learns, with the same vocabulary", positional=True)]
    out: Annotated[Path, Flag("folder for the student as it has become", metavar="DIR")]
    work: Annotated[Path | None, Flag("training state (default: OUT with .work behind its name)", metavar="DIR")] = None
    text: Annotated[str, Flag(".txt, .jsonl with text or prompt, .npy with ids, or toy:training")] = "toy:training"
    length: Annotated[int, Flag("tokens of a row", at_least=16)] = 256
    batch: Annotated[int, Flag("rows of a step", at_least=1)] = 6
    steps: Annotated[int, Flag("steps of training", at_least=1)] = 1000
    lr: Annotated[float, Flag("peak learning rate")] = 1e-3
    direction: Annotated[Direction, Flag("of the KL: student-teacher as on the card, or teacher-student as usual")] = (
        "student-teacher"
    )
    dtype: Annotated[Literal["float32", "bfloat16"], Flag("what the teacher computes in")] = "float32"
    device: Annotated[Literal["cpu", "cuda"], Flag("where both are")] = "cpu"
    threads: Annotated[int, Flag("of the processor", at_least=1, at_most=MOST_THREADS)] = 1
    seed: Annotated[int, Flag("of rows and masks", at_least=0, at_most=MOST_SEED)] = 0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not 0 < self.lr < 1:
            raise FlagError(f"--lr: expected a rate between 0 and 1, got {self.lr}")


class DistilResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.llada_distillation/1"
):
    """What the student has become.

    Attributes:
        agreement: of the likeliest tokens with the teacher's on held-out rows, by the ratio of masks, before and after.
        confident: the same where the student is sure.
    """

    model: str
    student: str
    out: str
    direction: Direction
    steps: int
    rows: int
    agreement: dict[str, tuple[float, float]]
    confident: dict[str, tuple[float, float]]
    minutes: float


class DrawnRows:
    """Batches of equally long rows [rows, length] int64, drawn by seed and step."""

    def __init__(self, rows: list[torch.Tensor], batch: int, device: str) -> None:
        self._rows = torch.stack(rows).to(device)
        self._batch = batch

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """Draw rows with replacement."""
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._rows[torch.randint(len(self._rows), (self._batch,), generator=draw).to(self._rows.device)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/training/diffusion/distil.py",
        DistilConfig,
        __doc__,
        EXAMPLES,
        others=(DiffusionError, PruningError),
        interrupted="the same command continues from the last saved step",
    )
    return command.run(argv, teach)


def teach(config: DistilConfig) -> DistilResult:
    """Train the student, write it and distillation.json, and measure it on held-out rows.

    Raises:
        DiffusionError: a checkpoint cannot be used, the vocabularies differ, or the text is too short.
        PruningError: the text cannot be read.
        CheckpointError: --out is one of the checkpoints that are read or another one, or cannot be written.
        RunDirError: the work folder is another run's, or holds others' files.
        WriteError: a file cannot be written.
    """
    check_out(config.out)
    work = config.work or config.out.with_name(f"{config.out.name}.work")
    own = is_begun(work) or (config.out / RESULT).exists()
    check_own(config.out, [config.model, config.student], own=own)
    require_device(config.device)
    with hold_folders(config.out, work), count_minutes(work / MINUTES, lambda: is_begun(work)) as minutes:
        return _teach(config, work, minutes)


def _teach(config: DistilConfig, work: Path, minutes: Callable[[], float]) -> DistilResult:
    """Train, write and measure, alone in the folders."""
    from transformers import PreTrainedTokenizerFast

    shapes = [read_config(folder) for folder in (config.model, config.student)]
    if shapes[0].vocab_size != shapes[1].vocab_size or shapes[0].mask_token_id != shapes[1].mask_token_id:
        raise DiffusionError(
            f"{config.student}: expected the teacher's {shapes[0].vocab_size} tokens and mask "
            f"{shapes[0].mask_token_id}, got {shapes[1].vocab_size} and {shapes[1].mask_token_id}; use prune.py"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model)
    progress = Progress()
    progress.say(f"reading {config.text}")
    text = read_rows(config.text, tokenizer, config.length, None)
    whole = [row for row in text.rows if len(row) == config.length]
    if len(whole) <= HELD_OUT:
        expected = f"more than {HELD_OUT} rows of {config.length} tokens"
        raise DiffusionError(f"{config.text}: expected {expected}, got {len(whole)}; pass more text, or lower --length")
    seen, unseen = whole[:-HELD_OUT], [row.to(config.device) for row in whole[-HELD_OUT:]]
    torch.set_num_threads(config.threads)
    teacher = load_model(config.model, getattr(torch, config.dtype), config.device)
    student = load_model(config.student, device=config.device)
    progress.say(f"measuring the student as it is on {HELD_OUT} held-out rows")
    before = {ratio: measure_agreement(teacher, student, unseen, ratio, config.seed) for ratio in RATIOS}
    claim_work(work, config.out, _list_settings(config, text.digest))
    rows = DrawnRows(seen, config.batch, config.device)
    schedule = Schedule(config.steps, config.lr, weight_decay=0.01)
    state, threads = work / "student.state", config.threads
    with defer_signals():
        distil(teacher, student, rows, schedule, config.seed + 1, config.direction, state, threads)
    write_checkpoint(config.out, student.config, student.state_dict(), config.model)
    # What is measured is what is stored, in bfloat16.
    stored = load_model(config.out, device=config.device)
    progress.say("measuring it as it has become")
    after = {ratio: measure_agreement(teacher, stored, unseen, ratio, config.seed) for ratio in RATIOS}
    result = DistilResult(
        model=str(config.model),
        student=str(config.student),
        out=str(config.out),
        direction=config.direction,
        steps=config.steps,
        rows=len(seen),
        agreement={f"{r}": (round(before[r][0], 4), round(after[r][0], 4)) for r in RATIOS},
        confident={f"{r}": (round(before[r][1], 4), round(after[r][1], 4)) for r in RATIOS},
        minutes=minutes(),
    )
    write_indented(config.out / RESULT, result)
    shutil.rmtree(work)
    return result


def _list_settings(config: DistilConfig, text: str) -> dict[str, object]:
    """List what decides about the student, so that another run does not continue its state."""
    names = ("batch", "steps", "lr", "direction", "dtype", "seed")
    models = [fingerprint(str(folder)) for folder in (config.model, config.student)]
    return {name: getattr(config, name) for name in names} | {"models": models, "text": text}


if __name__ == "__main__":
    sys.exit(main())
