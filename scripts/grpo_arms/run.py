"""Is a drafter beside a moving policy worth it? The same GRPO runs with a frozen drafter, a refreshed one, and none.

Each arm is a run of scripts/grpo.py with the same seeds, in a folder of its own below DIR; what is finished is read,
what is not is continued. DIR gets arms.json, arms.md and arms.png; the last stdout line is one JSON object (schema
laguna_serve.grpo_arms/1). Speeds are per processor second, the engine's as the kernel counts it in steps of 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.scripts.grpo_arms.report import NAMES, render_markdown
from laguna_serve.scripts.grpo_arms.result import ARMS, Arm, ArmRun, ArmsResult, find_gains, summarise
from laguna_serve.scripts.training.rl.config import ROOT, GrpoConfig
from laguna_serve.scripts.training.rl.run import RESULT, GrpoResult, train_policy
from laguna_serve.scripts.training.rl.sources import check_sources
from laguna_serve.scripts.training.rl.steps import Step
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_THREADS, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import say
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import RunDirError, check_out
from laguna_serve.serving.speculation.flags import DraftSampling, GammaOrAdaptive

EXAMPLES = """examples:
  python scripts/grpo_arms --model tests/toy/teacher --draft tests/toy/dflash --seeds 0,1 --out out/arms
  python scripts/grpo_arms --model tests/toy/teacher --draft tests/toy/dflash --gamma adaptive --out out/adaptive
  one arm alone, on another machine; its folder is then found here:
    python scripts/grpo_arms … --arms none --out out/arms

exit status: 0 (τ − 1) of the refreshed drafter is 1.5 times the frozen one's at the last versions, 1 it is not,
2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """The runs to compare; what is not said here is as scripts/grpo.py has it."""

    model: Annotated[str, Flag("Laguna checkpoint to start from: a folder", metavar="M")]
    draft: Annotated[str, Flag("DFlash drafter to begin with", metavar="D")]
    out: Annotated[Path, Flag("folder for the runs and the result", metavar="DIR")]
    seeds: Annotated[tuple[int, ...], Flag("default 0", metavar="N,N,…")] = (0,)
    arms: Annotated[tuple[Arm, ...], Flag("of frozen, refreshed, none (default: all)", metavar="ARM,…")] = ARMS
    gamma: GammaOrAdaptive = None
    draft_sampling: DraftSampling = "probabilistic"
    prompts: Annotated[Path, Flag("as in scripts/grpo.py (default: the toy prompts)")] = (
        ROOT / "tests/toy/prompts.jsonl"
    )
    steps: Annotated[int, Flag("default 60", at_least=1)] = 60
    prompts_per_step: Annotated[int, Flag("default 8", metavar="N", at_least=1)] = 8
    group: Annotated[int, Flag("completions per prompt (default 8)", metavar="N", at_least=2)] = 8
    measure_every: Annotated[int, Flag("default 5", metavar="N", at_least=1)] = 5
    refresh_every: Annotated[int, Flag("steps between refreshes (default 3)", metavar="N", at_least=1)] = 3
    refresh_steps: Annotated[int, Flag("of training in each (default 60)", metavar="N", at_least=1)] = 60
    refresh_lr: Annotated[float, Flag("AdamW's (default 0.001)", at_least=0)] = 1e-3
    threads: Annotated[int, Flag("of the trainer (default 1)", at_least=1, at_most=MOST_THREADS)] = 1
    so_far: Annotated[
        bool, Flag("start nothing: compare what the runs' logs have, cut to the steps that all of them have")
    ] = False
    goal: Annotated[float, Flag("held-out reward to which seconds are counted (default 0.9)")] = 0.9

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise FlagError(f"--seeds: expected different numbers, got {self.seeds}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise FlagError(f"--arms: expected different ones, got {', '.join(self.arms) or 'none'}")

    def describe(self, arm: Arm, seed: int) -> GrpoConfig:
        """Describe the run of an arm with a seed."""
        drafting = arm != "none"
        return GrpoConfig(
            model=self.model,
            draft=self.draft if drafting else None,
            gamma=self.gamma if drafting else None,
            draft_sampling=self.draft_sampling if drafting else "greedy",
            prompts=self.prompts,
            out=self.out / f"{arm}-{seed}",
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            group=self.group,
            measure_every=self.measure_every,
            seed=seed,
            threads=self.threads,
            refresh_drafter=arm == "refreshed",
            refresh_every=self.refresh_every,
            refresh_steps=self.refresh_steps,
            refresh_lr=self.refresh_lr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "scripts/grpo_arms",
        ArmsConfig,
        __doc__,
        EXAMPLES,
        interrupted=CONTINUES,
        measures=lambda config: not config.so_far,
    )
    return command.run(
        argv,
        compare_arms,
        show=render_markdown,
        line=Brief(without=("runs",)),
        judge=lambda result: HELD if result.holds else FELL_SHORT,
    )


def compare_arms(config: ArmsConfig) -> ArmsResult:
    """Run what is missing of every arm, and write arms.json, arms.md and arms.png.

    Raises:
        RunDirError: a folder holds another run. Whatever `train_policy` raises.
    """
    check_out(config.out)
    runs = read_so_far(config) if config.so_far else run_all(config)
    summaries = tuple(summarise(run, config.goal) for run in runs)
    result = ArmsResult(goal=config.goal, runs=tuple(runs), summaries=summaries, gains=find_gains(summaries))
    write_result(config.out / "arms.json", result)
    write_text(config.out / "arms.md", render_markdown(result))
    from laguna_serve.scripts.grpo_arms.plot import draw_arms  # takes a second to import

    draw_arms(result, config.out / "arms.png")
    return result


def run_all(config: ArmsConfig) -> list[ArmRun]:
    """Run what is missing of every arm."""
    runs: list[ArmRun] = []
    for seed in config.seeds:
        for arm in config.arms:
            number = f"{len(runs) + 1} of {len(config.seeds) * len(config.arms)}"
            say(f"{NAMES[arm]}, seed {seed} ({number}): {config.describe(arm, seed).out}")
            result = run_arm(config.describe(arm, seed))
            runs.append(ArmRun(arm=arm, seed=seed, environment=result.environment, run=result.run, log=result.log))
    return runs


def read_so_far(config: ArmsConfig) -> list[ArmRun]:
    """Read the logs of runs that need not be finished, cut to the steps that all have.

    Raises:
        RunDirError: a run has no log, or no step in it.
    """
    environment, logs = read_environment(current_argv()), {}
    for seed in config.seeds:
        for arm in config.arms:
            logs[arm, seed] = read_steps(config.describe(arm, seed).out / "log.jsonl")
    common = min(map(len, logs.values()))
    return [
        ArmRun(
            arm=arm,
            seed=seed,
            environment=environment,
            run=config.describe(arm, seed).decisive,
            log=tuple(log[:common]),
        )
        for (arm, seed), log in logs.items()
    ]


def read_steps(path: Path) -> list[Step]:
    """Read the steps of a run that may be going on: a last line without its end is still being written.

    Raises:
        RunDirError: there are none, or a line is none.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        steps = [msgspec.json.decode(line, type=Step) for line in lines if line.endswith(b"\n")]
    except msgspec.MsgspecError as error:
        raise RunDirError(f"{path}: expected a run's steps, got a line where {error}; choose another --out") from None
    taken = [step for step in steps if step.seconds is not None]
    if not taken:
        raise RunDirError(f"{path}: expected a run's steps, got none; leave --so-far out to run it")
    return taken


def run_arm(config: GrpoConfig) -> GrpoResult:
    """Read a finished run, or run it.

    Raises:
        RunDirError: the folder holds another one.
        CheckpointError: its model or its drafter was written anew since.
    """
    path = config.out / RESULT
    if not path.exists():
        result = train_policy(config)
        write_result(path, result)
        return result
    found = read_result(path, GrpoResult)
    if found.run != config.decisive or len(found.log) != config.steps + 1:
        raise RunDirError(f"{config.out}: expected this run, got another one's; choose another --out or remove it")
    check_sources(config.out, config.sources)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
