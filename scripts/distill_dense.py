"""Distil a Laguna mixture of experts into a dense student of the same cost per token.

Stage 1 trains every dense block on its own against its sparse block, stage 2 the whole student against the teacher's
logits on conversations (scripts/training/dense/stages.py).  The checkpoint is stock Laguna, narrower layers padded with
zeros; `laguna serve` loads it at its true widths and `laguna unpad` stores it so.  Writes to --report what was
measured: distillation.json, stage1_nmse.png and stage2_kl.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType, structs

from laguna_serve.scripts.text.rows import TOY
from laguna_serve.scripts.training.dense.stages import Recipe
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.kit.cli import HELD, run_command
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.flags import Flag, check_bounds, read_flags
from laguna_serve.serving.kit.results import to_json

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "laguna_serve.distillation/1"
DEFAULT = Recipe(seed=0, stage1_steps=800, stage2_steps=1200, rows=6, length=384)
EXAMPLES = """examples:
  the toy family's student (about 20 minutes on two cores):
    python scripts/distill_dense.py tests/toy/teacher --out tests/toy/dense --width 0=672 --width 3=613 \\
        --report bench/results/toy-distillation
  another teacher, own text:
    python scripts/distill_dense.py TEACHER --text code.jsonl --chats instructions.jsonl --length 2048 \\
        --stage1-steps 20000 --stage2-steps 5000 --out student

Stopped?  The same command continues from the last saved step.  Trains on a CUDA device where there is one.
exit status: 0 done, 2 it could not run, 130 interrupted
"""


def parse_width(text: str) -> tuple[int, int]:
    """LAYER=N: a layer and its width."""
    layer, separator, width = text.partition("=")
    if not separator or not layer.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"expected LAYER=N, got {text!r}; for example 3=613")
    return int(layer), int(width)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher, its student's widths, what both learn on, and for how long.

    Attributes:
        width: (layer, units) of layers that get another width than their cost asks for.
    """

    teacher: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", positional=True)
    ]
    out: Annotated[Path, Flag("folder for the student")]
    report: Annotated[Path | None, Flag("folder for distillation.json and the pictures (default: --out)")] = None
    work: Annotated[Path | None, Flag("training states, to continue from (default: .cache/distill-…)")] = None
    fresh: Annotated[bool, Flag("forget what the work folder holds")] = False
    text: Annotated[str, Flag("stage 1: .txt, .jsonl with text or prompt, or toy:training (default)")] = "toy:training"
    chats: Annotated[str, Flag('stage 2: .jsonl with {"messages": […]}, or toy:training (default)')] = "toy:training"
    width: Annotated[
        tuple[tuple[int, int], ...],
        Flag(
            "another width for a layer: any for a sparse one, a larger one for a dense one (repeatable)",
            metavar="LAYER=N",
            parse=parse_width,
            repeated=True,
        ),
    ] = ()
    stage1_steps: Annotated[int, Flag(f"default {DEFAULT.stage1_steps}", at_least=1)] = DEFAULT.stage1_steps
    stage2_steps: Annotated[int, Flag(f"default {DEFAULT.stage2_steps}", at_least=1)] = DEFAULT.stage2_steps
    rows: Annotated[int, Flag(f"sequences in a batch (default {DEFAULT.rows})", at_least=1)] = DEFAULT.rows
    length: Annotated[int, Flag(f"tokens in a sequence (default {DEFAULT.length})", at_least=1)] = DEFAULT.length
    measure_tokens: Annotated[int, Flag("held-out tokens to measure the loss on (default 65536)", metavar="N")] = 65_536
    dtype: Annotated[Literal["bfloat16", "float32"], Flag("stored as (bfloat16)")] = "bfloat16"
    seed: Annotated[int, Flag()] = DEFAULT.seed

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def recipe(self) -> Recipe:
        """What decides the outcome besides teacher and text."""
        return replace(
            DEFAULT,
            seed=self.seed,
            stage1_steps=self.stage1_steps,
            stage2_steps=self.stage2_steps,
            rows=self.rows,
            length=self.length,
        )


class DistillResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """A student, as it was made: the report with the training's logs, the manifest beside the checkpoint with digests.

    Attributes:
        widths: of its layers.
        parameters: of the "teacher", of the student's "true" widths, and as "stored" with padding.
        minutes: of each stage, earlier runs that were stopped included.
        measured: held-out figures after each stage (training/dense/stages.py).
        logs: records of each stage's steps.
        sha256: of every file of the checkpoint.
    """

    environment: Environment
    teacher: str
    recipe: dict[str, int | str]
    widths: tuple[int, ...]
    parameters: dict[str, int]
    minutes: dict[str, float]
    measured: dict[str, dict[str, float]]
    logs: dict[str, list[dict[str, int | float]]] | UnsetType = UNSET
    sha256: dict[str, str] | UnsetType = UNSET


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(DistillConfig, argv, prog="scripts/distill_dense.py", description=__doc__, epilog=EXAMPLES)
    interrupted = "the same command continues from the last saved step"
    return run_command("distill_dense.py", lambda: run(config), interrupted=interrupted)


def run(config: DistillConfig) -> int:
    """Distil, write the report and print the result without its logs. Returns the exit status."""
    result = distil(config)
    write_report(result, config.report or config.out)
    write_manifest(result, config.out)
    print(json.dumps({key: value for key, value in to_json(result).items() if key != "logs"}))
    return HELD


def distil(config: DistillConfig) -> DistillResult:
    """Both stages, or what is missing of them; writes the checkpoint.

    Raises:
        CommandError: teacher, text, widths or folders cannot be used.
    """
    folder, recipe = require_folder(config.teacher), config.recipe
    work = open_work(config, recipe, folder)
    import torch
    from transformers import AutoConfig, AutoTokenizer, LagunaForCausalLM

    from laguna_serve.scripts.text.rows import read_rows
    from laguna_serve.scripts.training.dense import stages, student, text

    # Refused before the text is read and the weights are.
    widths = student.choose_widths(AutoConfig.from_pretrained(folder), dict(config.width))
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The shorter first: what is wrong with it is said before a large text is made tokens.
    chats = text.read_chats(config.chats, tokenizer)
    training = text.read_text(config.text, tokenizer, recipe.length)
    held_out = read_rows(_held_out(config.text), tokenizer, recipe.length, config.measure_tokens).rows
    held_out_chats = text.read_chats(_held_out(config.chats), tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teacher = LagunaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    sparse = [layer for layer, kind in enumerate(teacher.config.mlp_layer_types) if kind == "sparse"]

    started = time.monotonic()
    usage = stages.count_usage(teacher, sparse, training, recipe)
    blocks = student.start_blocks(teacher, widths, usage).to(device)
    logs = {"stage1": stages.train_blocks(teacher, blocks, training, recipe, work / "stage1.state")}
    minutes = add_minutes(work, "stage1", started)
    model = student.assemble_student(teacher, blocks, widths)
    measured = {"after_stage1": stages.measure(teacher, model, held_out, held_out_chats, recipe)}
    print(f"distill_dense: after stage 1: {_show(measured['after_stage1'])}", file=sys.stderr)

    started = time.monotonic()
    logs["stage2"] = stages.train_student(teacher, model, chats, recipe, work / "stage2.state")
    minutes = add_minutes(work, "stage2", started)
    measured["after_stage2"] = stages.measure(teacher, model, held_out, held_out_chats, recipe)
    print(f"distill_dense: after stage 2: {_show(measured['after_stage2'])}", file=sys.stderr)

    stored = getattr(torch, config.dtype)
    student.save_padded(model, widths, config.out, stored)
    tokenizer.save_pretrained(config.out)
    true = sum(p.numel() for p in model.parameters())
    padded = true + sum(3 * (max(widths) - width) * teacher.config.hidden_size for width in widths)
    parameters = {"teacher": sum(p.numel() for p in teacher.parameters()), "true": true, "stored": padded}
    fields = {"widths": widths, "parameters": parameters, "minutes": minutes, "measured": measured, "logs": logs}
    described = {"environment": msgspec.to_builtins(read_environment(current_argv())), "teacher": config.teacher}
    described |= {"recipe": asdict(recipe) | {"text": config.text, "chats": config.chats}}
    return msgspec.convert({"schema": SCHEMA, **round_floats(described | fields)}, DistillResult)


def add_minutes(work: Path, stage: str, started: float) -> dict[str, float]:
    """Add to what every stage took so far, earlier runs that were stopped included."""
    noted = work / "minutes.json"
    minutes: dict[str, float] = json.loads(noted.read_text()) if noted.exists() else {}
    minutes[stage] = round(minutes.get(stage, 0.0) + (time.monotonic() - started) / 60, 1)
    noted.write_text(json.dumps(minutes))
    return minutes


def _held_out(source: str) -> str:
    """Name the half of the toy corpus that nothing was trained on; of another source the same text is measured."""
    return source.replace(":training", ":held-out") if source in TOY else source


def _show(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def write_report(result: DistillResult, report: Path) -> None:
    """distillation.json and the two pictures."""
    from laguna_serve.scripts.training.dense.plot import draw_blocks, draw_student

    report.mkdir(parents=True, exist_ok=True)
    environment = result.environment
    parts = [f"teacher {result.teacher}", f"{environment.cpu}, {environment.cores} cores", environment.date[:10]]
    source = "  ·  ".join(parts)
    assert not isinstance(result.logs, UnsetType)
    draw_blocks(result.logs["stage1"], report / "stage1_nmse.png", source)
    draw_student(result.logs["stage2"], report / "stage2_kl.png", source)
    (report / "distillation.json").write_text(json.dumps(to_json(result)) + "\n", encoding="utf-8")


def write_manifest(result: DistillResult, out: Path) -> None:
    """Write what was made, how and from what, with a SHA-256 of every file; beside the checkpoint."""
    files = sorted(path for path in out.iterdir() if path.is_file() and path.suffix != ".md")
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "MANIFEST.json"
    }
    text = json.dumps(to_json(structs.replace(result, logs=UNSET, sha256=digests)), indent=1)
    (out / "MANIFEST.json").write_text(text + "\n", encoding="utf-8")


def round_floats(value: Any, digits: int = 5) -> Any:
    """Round every float to so many significant digits: logs are read by people."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: round_floats(item, digits) for key, item in value.items()}
    return [round_floats(item, digits) for item in value] if isinstance(value, list) else value


def open_work(config: DistillConfig, recipe: Recipe, folder: Path) -> Path:
    """Open the folder of the training states.  Raises CheckpointError when it holds another run's."""
    wanted: dict[str, Any] = asdict(recipe) | {
        "text": config.text,
        "chats": config.chats,
        "width": sorted(config.width),
    }
    described = (folder / "config.json").read_bytes()
    wanted["teacher"] = hashlib.sha256(described + str(folder.resolve()).encode()).hexdigest()[:16]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    work = config.work or ROOT / ".cache" / f"distill-{digest}"
    if config.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    noted = work / "recipe.json"
    if noted.exists() and noted.read_text() != json.dumps(wanted):
        raise CheckpointError(f"{work}: expected the states of this run, got another run's; pass --fresh or --work")
    noted.write_text(json.dumps(wanted))
    return work


if __name__ == "__main__":
    sys.exit(main())
