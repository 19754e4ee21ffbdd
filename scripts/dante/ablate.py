"""What does each part of DANTE do? The same training without it, seed by seed, beside plain fine-tuning and the start.

Arms: base (the initialisation), sft, no-cwce, no-tea, no-curriculum, full, and tea-sum (the anchor as printed). A seed
draws --share of the records, for every arm alike, and shuffles where there is no curriculum. Measured in nats per byte
on the teacher's answers to prompts of another cache, and on other text, which tells what is forgotten. Differences are
paired by text and seed.

Writes ablation.json, ablation.md and ablation.png to --out, and every student. What is trained is kept: the same
command continues, and with more --seeds trains what is new. It needs .venv-train (scripts/client_env.sh train).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.dante.arms import ARMS, BASE, AblationArm, AblationResult, Reading, compare_arms
from laguna_serve.scripts.dante.options import DanteConfig, DanteResult
from laguna_serve.scripts.dante.page import draw_ablation, format_ablation
from laguna_serve.scripts.dante.train import require_trainer, train_student
from laguna_serve.scripts.text.rows import read_documents
from laguna_serve.scripts.training.dante.measure import Passage, measure_passages
from laguna_serve.scripts.training.dante.records import CacheError, read_cache
from laguna_serve.scripts.training.dante.rows import EntropyScale
from laguna_serve.scripts.training.devices import require_device
from laguna_serve.serving.checkpoint.folder import find_folder
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_THREADS, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint, hold_folder

EXAMPLES = """examples:
  .venv-train/bin/python scripts/dante ablate MODEL --cache out/cache --held-out out/held-out --out out/ablation
  .venv-train/bin/python scripts/dante ablate MODEL --cache DIR --held-out DIR --other other.jsonl --seeds 5 --out DIR

exit status: 0 every bar is met, 1 one is not (the table says which), 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """A student, what it learns, and what it is measured on; of the training what differs from scripts/dante train."""

    model: Annotated[Path, Flag("the student's initialisation: a checkpoint's folder, or a hub id", positional=True)]
    cache: Annotated[Path, Flag("what is taught: a folder of scripts/dante cache", metavar="DIR")]
    held_out: Annotated[Path, Flag("the teacher's answers to other prompts: a cache, too", metavar="DIR")]
    out: Annotated[Path, Flag("folder for the result, and what was trained", metavar="DIR")]
    other: Annotated[str, Flag("text that is not taught, as in scripts/text/rows.py", metavar="TEXT")] = "toy:held-out"
    passages: Annotated[int, Flag("of the other text (default 64)", metavar="N", at_least=2)] = 64
    characters: Annotated[int, Flag("of a passage (default 600)", metavar="N", at_least=64)] = 600
    seeds: Annotated[int, Flag("default 3", metavar="N", at_least=1)] = 3
    arms: Annotated[tuple[str, ...], Flag("default: all but base, which always is", metavar="ARM,…")] = tuple(ARMS)
    steps: Annotated[int, Flag("default 2000", at_least=1)] = 2000
    batch: Annotated[int, Flag("rows of a step (default 128)", at_least=1)] = 128
    length: Annotated[int, Flag("tokens of a row at most (default 4096)", at_least=16)] = 4096
    lr: Annotated[float, Flag("peak (default 2e-5)")] = 2e-5
    share: Annotated[float, Flag("of the records that a seed draws (default 0.8)")] = 0.8
    entropy_scale: Annotated[EntropyScale, Flag("what CWCE weighs by")] = "nats"
    device: Annotated[Literal["cpu", "cuda"], Flag("where (default cpu)")] = "cpu"
    precision: Annotated[Literal["float32", "bfloat16"], Flag("what training computes in")] = "float32"
    threads: Annotated[int, Flag("of the processor (default 1)", at_least=1, at_most=MOST_THREADS)] = 1

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        unknown = set(self.arms) - set(ARMS)
        if unknown or not self.arms or len(set(self.arms)) != len(self.arms):
            raise FlagError(f"--arms: expected some of {', '.join(ARMS)}, each once, got {', '.join(self.arms)}")

    def describe(self, arm: str, seed: int) -> DanteConfig:
        """Describe the training of an arm with a seed."""
        usual = DanteConfig(
            model=self.model,
            cache=self.cache,
            out=self.out / "students" / f"{arm}-{seed}",
            steps=self.steps,
            batch=self.batch,
            length=self.length,
            lr=self.lr,
            share=self.share,
            entropy_scale=self.entropy_scale,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            seed=seed,
        )
        return replace(usual, **ARMS[arm])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/dante ablate", AblateConfig, __doc__, EXAMPLES, others=(PruningError,), interrupted=CONTINUES
    )
    return command.run(
        argv,
        ablate,
        show=format_ablation,
        line=Brief(without=("readings",)),
        judge=lambda result: HELD if all(bar.met for bar in result.bars) else FELL_SHORT,
    )


def ablate(config: AblateConfig) -> AblationResult:
    """Train and measure what is missing, and write the result.

    Raises:
        CacheError, PruningError: a cache, or the other text, cannot be used.
        RunDirError: --out holds another ablation's. Whatever `train_student` raises.
    """
    require_trainer()
    require_device(config.device)
    find_folder(str(config.model))
    check_out(config.out)
    environment = read_environment(current_argv())
    taught = {str(record.prompt) for record in read_cache(config.cache)}
    held_out = [record for record in read_cache(config.held_out) if str(record.prompt) not in taught]
    if len(held_out) < 2:
        raise CacheError(f"{config.held_out}: expected two prompts or more that --cache has not, got {len(held_out)}")
    texts = {
        "teacher": [Passage(record.prompt, record.teacher_text) for record in held_out],
        "other": cut_passages(read_documents(config.other), config.passages, config.characters),
    }
    with hold_folder(config.out):
        result = _run_arms(config, environment, texts)
        write_result(config.out / "ablation.json", result)
        write_text(config.out / "ablation.md", format_ablation(result) + "\n")
        draw_ablation(result, config.out / "ablation.png")
    return result


def _run_arms(config: AblateConfig, environment: Environment, texts: dict[str, list[Passage]]) -> AblationResult:
    """Train and measure what is missing of every arm and seed."""
    work = config.out / "work"
    claim_folder(work, _list_settings(config, texts), alone=True)
    progress = Progress()
    readings = {BASE: {0: measure_student(config, config.model, work / f"{BASE}-0.json", texts)}}
    arms: dict[str, list[DanteResult]] = {}
    total = config.seeds * len(config.arms)
    for number, (seed, arm) in enumerate((seed, arm) for seed in range(config.seeds) for arm in config.arms):
        run = config.describe(arm, seed)
        done = run.out / "training.json"
        arms.setdefault(arm, []).append(read_result(done, DanteResult) if done.exists() else train_student(run))
        readings.setdefault(arm, {})[seed] = measure_student(config, run.out, work / f"{arm}-{seed}.json", texts)
        progress.step("ablation", number + 1, total)
    summaries = tuple(
        AblationArm(
            name=name,
            drift=tuple(run.drift for run in runs),
            weights=runs[0].weights,
            minutes=round(sum(run.minutes for run in runs), 2),
        )
        for name, runs in arms.items()
    )
    return compare_arms(environment, str(config.model), config.steps, config.batch, summaries, readings)


def cut_passages(documents: Sequence[str], count: int, characters: int) -> list[Passage]:
    """Cut documents into passages of whole characters and take evenly spaced ones.

    Raises:
        CacheError: there are not two of them.
    """
    parts = [
        text[start : start + characters] for text in documents for start in range(0, len(text) - characters, characters)
    ]
    chosen = [Passage("", parts[i * len(parts) // count]) for i in range(count)] if len(parts) >= count else []
    chosen = chosen or [Passage("", part) for part in parts]
    if len(chosen) < 2:
        raise CacheError(
            f"--other: expected two passages of {characters} characters, got {len(chosen)}; pass more text"
        )
    return chosen


def measure_student(config: AblateConfig, folder: Path, noted: Path, texts: dict[str, list[Passage]]) -> Reading:
    """Measure a student on every text, or read what was measured."""
    if noted.exists():
        return read_result(noted, Reading)
    import torch
    from transformers import AutoTokenizer

    from laguna_serve.scripts.training.dante.loading import load_student

    torch.set_num_threads(config.threads)
    model = load_student(folder).to(config.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, sizes = {}, {}
    for name, passages in texts.items():
        one, num_bytes = measure_passages(model, tokenizer, passages, config.length)
        nats[name], sizes[name] = tuple(one.tolist()), tuple(num_bytes.tolist())
    reading = Reading(nats=nats, bytes=sizes)
    write_result(noted, reading)
    return reading


def _list_settings(config: AblateConfig, texts: dict[str, list[Passage]]) -> dict[str, object]:
    """List what decides about students and measurements; not how many seeds or which arms, as they can be added."""
    return {
        "model": fingerprint(str(config.model)),
        "cache": [msgspec.to_builtins(record) for record in read_cache(config.cache)],
        "texts": {name: [[p.context, p.text] for p in passages] for name, passages in texts.items()},
        "training": [config.steps, config.batch, config.length, config.lr, config.share, config.precision],
        "entropy_scale": config.entropy_scale,
    }


if __name__ == "__main__":
    sys.exit(main())
