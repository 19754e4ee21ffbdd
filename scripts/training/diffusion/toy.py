"""Make the toy diffusion pair: tests/toy/llada, and tests/toy/llada-draft by pruning and distillation.

The tokenizer and the corpus are the toy teacher's. The model is trained on masked rows (pretraining.py), a draft cut
out of it (prune.py) and taught its choices (distillation.py). Training saves its state on the way: the same command
continues after an interruption.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import Llada, load_model
from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.training.diffusion import pretraining
from laguna_serve.scripts.training.diffusion.ablation import RATIOS
from laguna_serve.scripts.training.diffusion.distillation import Direction, distil, measure_agreement
from laguna_serve.scripts.training.diffusion.prune import BlockAgreement, PruneConfig, prune
from laguna_serve.scripts.training.diffusion.saving import write_checkpoint
from laguna_serve.scripts.training.loop import Schedule
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import current_argv
from laguna_serve.serving.kit.files import hash_file
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag
from laguna_serve.serving.kit.results import write_indented
from laguna_serve.serving.kit.run_dir import check_out, hold_folders
from laguna_serve.serving.kit.signals import defer_signals

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
EXAMPLES = """examples:
  python scripts/training/diffusion/toy.py                        remake tests/toy/llada and tests/toy/llada-draft
  python scripts/training/diffusion/toy.py --steps 5 --distillation-steps 5 --out /tmp/toy    does it work?

exit status: 0 done, 2 it could not run, 130 interrupted
"""
REMOVED_LAYERS, KEPT_UNITS = 2, 0.75
DISTILLATION_LR = 1e-3
DIRECTION: Direction = "student-teacher"


@dataclass(frozen=True, kw_only=True)
class ToyPairConfig(BoundedConfig):
    """Where the pair goes, and how long it is trained."""

    out: Annotated[Path, Flag("folder for llada/ and llada-draft/ (default: tests/toy)")] = TOY
    work: Annotated[Path | None, Flag("training states (default .cache/llada-…)")] = None
    steps: Annotated[int, Flag("of the model's training", at_least=1)] = pretraining.SCHEDULE.steps
    distillation_steps: Annotated[int, Flag("of the draft's", at_least=1)] = 400
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How often the draft's likeliest tokens are the model's at masked positions, and where it is sure of them."""

    argmax: float
    confident: float


class ToyPairResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.toy_llada/1"):
    """What was made and what it is worth on held-out modules.

    Attributes:
        held_out_loss: of the model, nats a masked token, by the ratio of masks.
        agreement: of the draft, before and after its distillation, by the ratio of masks.
        cpu_minutes: processor time of all of it, one thread.
    """

    command: str
    python: str
    versions: dict[str, str]
    steps: tuple[int, int]
    parameters: tuple[int, int]
    held_out_loss: dict[str, float]
    removed_layers: tuple[int, int]
    blocks: tuple[BlockAgreement, ...]
    direction: Direction
    agreement: dict[str, tuple[Agreement, Agreement]]
    cpu_minutes: float
    sha256: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    interrupted = "the same command continues from the last saved step"
    command = Command(
        "scripts/training/diffusion/toy.py",
        ToyPairConfig,
        __doc__,
        EXAMPLES,
        others=(DiffusionError, PruningError),
        interrupted=interrupted,
    )
    return command.run(argv, make_pair)


def make_pair(config: ToyPairConfig) -> ToyPairResult:
    """Train, prune, distil, measure, and write both checkpoints with LLADA.json beside them.

    Raises:
        WriteError: a file cannot be written.
    """
    check_out(config.out)
    # Some sums of a backward pass are otherwise added in the order in which threads come to them.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(pretraining.THREADS)
    work = config.work or ROOT / ".cache" / f"llada-{config.seed}-{config.steps}-{config.distillation_steps}"
    check_out(work, "--work")
    taken = count_minutes(work / MINUTES, lambda: any(work.iterdir()), time.process_time)
    with hold_folders(config.out, work), taken as minutes:
        return _make_pair(config, work, minutes)


def _make_pair(config: ToyPairConfig, work: Path, minutes: Callable[[], float]) -> ToyPairResult:
    """Do what is missing, alone in the folders; Ctrl-C is obeyed between two steps of training."""
    modules = corpus.read_modules()
    seen, unseen = ([m for m in modules if m.held_out == held] for held in (False, True))
    tokenizer = load_tokenizer(TOY / "teacher")
    rows = pretraining.CutRows(seen, tokenizer)
    model = pretraining.start_model(config.seed)
    with defer_signals():
        pretraining.train_masked(model, rows, config.seed, config.steps, work / "llada.state")
    folder, draft_folder, pruned = config.out / "llada", config.out / "llada-draft", work / "pruned"
    write_checkpoint(folder, model.config, model.state_dict(), TOY / "teacher")
    # What is measured and taught is what is stored, in bfloat16.
    teacher = load_model(folder)
    losses = {f"{r}": round(pretraining.held_out_loss(teacher, unseen, tokenizer, r), 4) for r in RATIOS}
    shutil.rmtree(pruned, ignore_errors=True)
    cut = prune(PruneConfig(model=folder, out=pruned, remove_layers=REMOVED_LAYERS, keep_units=KEPT_UNITS))
    student = load_model(pruned)
    held_out = [torch.tensor(tokenizer(m.text)["input_ids"][: pretraining.LENGTH]) for m in unseen]
    before = _measure(teacher, student, held_out, config.seed)
    schedule = Schedule(config.distillation_steps, DISTILLATION_LR, weight_decay=0.01)
    state = work / "draft.state"
    with defer_signals():
        distil(teacher, student, rows, schedule, config.seed + 1, DIRECTION, state, pretraining.THREADS)
    write_checkpoint(draft_folder, student.config, student.state_dict(), TOY / "teacher")
    after = _measure(teacher, load_model(draft_folder), held_out, config.seed)
    files = sorted(path for made in (folder, draft_folder) for path in made.iterdir())
    result = ToyPairResult(
        command=shlex.join(current_argv()),
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        steps=(config.steps, config.distillation_steps),
        parameters=cut.parameters,
        held_out_loss=losses,
        removed_layers=cut.removed,
        blocks=cut.blocks,
        direction=DIRECTION,
        agreement={f"{r}": (before[r], after[r]) for r in RATIOS},
        cpu_minutes=round(minutes(), 1),
        sha256={p.relative_to(config.out).as_posix(): hash_file(p) for p in files},
    )
    write_indented(config.out / "LLADA.json", result)
    return result


def _measure(teacher: Llada, student: Llada, rows: list[torch.Tensor], seed: int) -> dict[float, Agreement]:
    measured = {}
    for ratio in RATIOS:
        argmax, confident = measure_agreement(teacher, student, rows, ratio, seed)
        measured[ratio] = Agreement(argmax=round(argmax, 4), confident=round(confident, 4))
    return measured


if __name__ == "__main__":
    sys.exit(main())
