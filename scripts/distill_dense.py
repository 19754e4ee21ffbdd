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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from laguna_serve.scripts.text.rows import TOY
from laguna_serve.scripts.training.dense.stages import Recipe
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.kit.cli import Parser, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment

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


def distil(args: argparse.Namespace, recipe: Recipe, folder: Path, work: Path) -> dict[str, Any]:
    """Both stages; writes the checkpoint and returns logs and measurements."""
    import torch
    from transformers import AutoTokenizer, LagunaForCausalLM

    from laguna_serve.scripts.text.rows import read_rows
    from laguna_serve.scripts.training.dense import stages, student, text

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training = text.read_text(args.text, tokenizer, recipe.length)
    chats = text.read_chats(args.chats, tokenizer)
    held_out = read_rows(_held_out(args.text), tokenizer, recipe.length, args.measure_tokens).rows
    held_out_chats = text.read_chats(_held_out(args.chats), tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teacher = LagunaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    widths = student.choose_widths(teacher.config, dict(args.width))
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

    stored = getattr(torch, args.dtype)
    student.save_padded(model, widths, args.out, stored)
    tokenizer.save_pretrained(args.out)
    true = sum(p.numel() for p in model.parameters())
    padded = true + sum(3 * (max(widths) - width) * teacher.config.hidden_size for width in widths)
    parameters = {"teacher": sum(p.numel() for p in teacher.parameters()), "true": true, "stored": padded}
    return {"widths": widths, "parameters": parameters, "minutes": minutes, "measured": measured, "logs": logs}


def add_minutes(work: Path, stage: str, started: float) -> dict[str, float]:
    """What every stage took so far, earlier runs that were stopped included."""
    noted = work / "minutes.json"
    minutes: dict[str, float] = json.loads(noted.read_text()) if noted.exists() else {}
    minutes[stage] = round(minutes.get(stage, 0.0) + (time.monotonic() - started) / 60, 1)
    noted.write_text(json.dumps(minutes))
    return minutes


def _held_out(source: str) -> str:
    """The toy corpus has a half that nothing was trained on; of another source the same text is measured."""
    return source.replace(":training", ":held-out") if source in TOY else source


def _show(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def write_report(result: dict[str, Any], report: Path) -> None:
    """distillation.json and the two pictures."""
    from laguna_serve.scripts.training.dense.plot import draw_blocks, draw_student

    report.mkdir(parents=True, exist_ok=True)
    environment = result["environment"]
    parts = [f"teacher {result['teacher']}", f"{environment['cpu']}, {environment['cores']} cores"]
    source = "  ·  ".join([*parts, environment["date"][:10]])
    draw_blocks(result["logs"]["stage1"], report / "stage1_nmse.png", source)
    draw_student(result["logs"]["stage2"], report / "stage2_kl.png", source)
    rounded = json.dumps(result, default=str, indent=None)
    (report / "distillation.json").write_text(rounded + "\n", encoding="utf-8")


def write_manifest(result: dict[str, Any], out: Path) -> None:
    """What was made, how and from what, with a SHA-256 of every file; beside the checkpoint."""
    files = sorted(path for path in out.iterdir() if path.is_file() and path.suffix != ".md")
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "MANIFEST.json"
    }
    described = {key: value for key, value in result.items() if key != "logs"} | {"sha256": digests}
    (out / "MANIFEST.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def round_floats(value: Any, digits: int = 5) -> Any:
    """The same with every float to so many significant digits: logs are read by people."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: round_floats(item, digits) for key, item in value.items()}
    return [round_floats(item, digits) for item in value] if isinstance(value, list) else value


def parse_width(text: str) -> tuple[int, int]:
    """LAYER=N."""
    layer, separator, width = text.partition("=")
    if not separator or not layer.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"expected LAYER=N, got {text!r}; for example 3=613")
    return int(layer), int(width)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("teacher", help="Laguna checkpoint: a folder, or a hub id that is in the local cache")
    parser.add_argument("--out", type=Path, required=True, help="folder for the student")
    parser.add_argument("--report", type=Path, help="folder for distillation.json and the pictures (default: --out)")
    parser.add_argument("--work", type=Path, help="training states, to continue from (default: .cache/distill-…)")
    parser.add_argument("--fresh", action="store_true", help="forget what the work folder holds")
    text = "stage 1: .txt, .jsonl with text or prompt, or toy:training (default)"
    parser.add_argument("--text", default="toy:training", help=text)
    chats = 'stage 2: .jsonl with {"messages": […]}, or toy:training (default)'
    parser.add_argument("--chats", default="toy:training", help=chats)
    width = "another width for a layer: any for a sparse one, a larger one for a dense one (repeatable)"
    parser.add_argument("--width", type=parse_width, action="append", default=[], metavar="LAYER=N", help=width)
    parser.add_argument("--stage1-steps", type=int, default=DEFAULT.stage1_steps, help="default %(default)s")
    parser.add_argument("--stage2-steps", type=int, default=DEFAULT.stage2_steps, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=DEFAULT.rows, help="sequences in a batch (default %(default)s)")
    parser.add_argument("--length", type=int, default=DEFAULT.length, help="tokens in a sequence (default %(default)s)")
    measured = "held-out tokens to measure the loss on (default %(default)s)"
    parser.add_argument("--measure-tokens", type=int, default=65_536, metavar="N", help=measured)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="stored as (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed)
    args = parser.parse_args()
    for name in ("stage1_steps", "stage2_steps", "rows", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    return args


def open_work(args: argparse.Namespace, recipe: Recipe, folder: Path) -> Path:
    """The folder of the training states.  Raises CheckpointError when it holds another run's."""
    wanted: dict[str, Any] = asdict(recipe) | {"text": args.text, "chats": args.chats, "width": sorted(args.width)}
    config = (folder / "config.json").read_bytes()
    wanted["teacher"] = hashlib.sha256(config + str(folder.resolve()).encode()).hexdigest()[:16]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    work: Path = args.work or ROOT / ".cache" / f"distill-{digest}"
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    noted = work / "recipe.json"
    if noted.exists() and noted.read_text() != json.dumps(wanted):
        raise CheckpointError(f"{work}: expected the states of this run, got another run's; pass --fresh or --work")
    noted.write_text(json.dumps(wanted))
    return work


def main() -> int:
    args = parse()
    folder = require_folder(args.teacher)
    recipe = replace(
        DEFAULT,
        seed=args.seed,
        stage1_steps=args.stage1_steps,
        stage2_steps=args.stage2_steps,
        rows=args.rows,
        length=args.length,
    )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": describe_environment(current_argv()),
        "teacher": args.teacher,
    }
    result |= {"recipe": asdict(recipe) | {"text": args.text, "chats": args.chats}}
    result |= distil(args, recipe, folder, open_work(args, recipe, folder))
    result = round_floats(result)
    write_report(result, args.report or args.out)
    write_manifest(result, args.out)
    print(json.dumps({key: value for key, value in result.items() if key != "logs"}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("distill_dense", main, interrupted="the same command continues from the last saved step"))
