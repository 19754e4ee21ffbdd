"""Train a policy by GRPO against a served model: sample, reward, one step of gradient, new weights into the engine.

A small, whole example of an RL loop on this project's parts: rollouts come from the gateway, in groups that share a
prompt; the trainer is plain PyTorch; every version goes back through the gateway's /admin/update_weights from a folder
(plugins/weight_folder.py), and every rollout is checked to be of the version that it was asked of.  The reward
(evals/codegen/syntax_reward.py) is one that a model of a few million parameters can raise.  A drafter, if one is given,
speculates for the policy all along and stays as it was, or, with --refresh-drafter, learns beside it from the rollouts
(scripts/training/rl/refresh): its acceptance is noted per version.

The trainer replays the engine's choice of experts (scripts/training/rl/replay.py), and a token's weight is the ratio
of trainer's and engine's probability, up to a cap (importance.py there).  Before every step it is noted how far the two
are apart on the sampled tokens, apart from those behind a tie of two experts (mismatch.py): rounding alone, if the
engine has the trainer's weights.

DIR gets log.jsonl (a line per step), state.pt (to continue from), versions/ (checkpoints), drafters/ (the serving one),
and grpo.json, reward.png.
The last stdout line is one JSON object (schema laguna_serve.grpo/1).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from laguna_serve.evals.problems.splits import is_held_out
from laguna_serve.scripts.training.rl.refresh.live import Steps
from laguna_serve.scripts.training.rl.refresh.notes import RefreshRun, describe_drafter
from laguna_serve.scripts.training.rl.rollouts import Rollout, RolloutError, sample_groups
from laguna_serve.scripts.training.rl.service import TrainingService, open_service
from laguna_serve.scripts.training.rl.steps import GrpoRun, HeldOut, Step, StepSeconds, TiedTokens
from laguna_serve.scripts.training.rl.stopwatch import Stopwatch
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.traffic import TrafficRecord
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, run_command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds, read_flags
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.kit.signals import check_signals, defer_signals, hold_signals
from laguna_serve.serving.speculation.flags import ADAPTIVE, DraftSampling, parse_gamma_or_adaptive

if TYPE_CHECKING:
    from laguna_serve.scripts.training.rl.refresh.refresher import Refresher
    from laguna_serve.scripts.training.rl.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_SAMPLES = 2  # completions of each held-out prompt
EXAMPLES = """examples:
  the toy teacher, four minutes on two cores:
    python scripts/grpo.py --model tests/toy/teacher --draft tests/toy/dflash --out out/grpo
  another seed, more steps:
    python scripts/grpo.py --model tests/toy/teacher --steps 120 --seed 1 --out out/grpo-1
  with a drafter that learns every 4 steps, drafts drawn from its distribution:
    python scripts/grpo.py --model tests/toy/teacher --draft tests/toy/dflash --draft-sampling probabilistic \\
        --refresh-drafter --refresh-every 4 --out out/grpo-refreshed
  one picture of several runs:
    python -m laguna_serve.scripts.training.rl.plot out/grpo out/grpo-1 --out reward.png

Stopped?  Ctrl-C waits for the end of the step and saves it; the same command continues from the last saved step.
exit status: 0 the held-out reward rose, 1 it did not, 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """A policy to train, on what, and for how long."""

    model: Annotated[str, Flag("Laguna checkpoint to start from: a folder", metavar="M")]
    draft: Annotated[str | None, Flag("DFlash drafter that speculates for it", metavar="D")] = None
    gamma: Annotated[
        int | Literal["adaptive"] | None,
        Flag(
            "tokens proposed per step (default: the most), or adaptive: decided in every step",
            metavar="N|max|adaptive",
            parse=parse_gamma_or_adaptive,
        ),
    ] = None
    draft_sampling: DraftSampling = "greedy"
    prompts: Annotated[
        Path,
        Flag('JSON Lines with "id" and "prompt"; a quarter of the files is held out (default: the toy prompts)'),
    ] = ROOT / "tests/toy/prompts.jsonl"
    out: Annotated[Path, Flag("folder for log, state and versions", metavar="DIR")]
    steps: Annotated[int, Flag("default 60", at_least=1)] = 60
    prompts_per_step: Annotated[int, Flag("default 8", metavar="N", at_least=1)] = 8
    group: Annotated[int, Flag("completions per prompt (default 8)", metavar="N", at_least=2)] = 8
    max_tokens: Annotated[int, Flag("of a completion (default 40)", metavar="N", at_least=2)] = 40
    lr: Annotated[float, Flag("AdamW's (default 0.0002)")] = 2e-4
    replay_experts: Annotated[
        bool, Flag("train with the experts that the engine chose (default: on, for a mixture)", either_way=True)
    ] = True
    importance_cap: Annotated[
        float, Flag("the most that a token weighs, as trainer's ÷ engine's probability (default 2)", at_least=1)
    ] = 2.0
    drop_beyond: Annotated[
        float | None,
        Flag(
            "leave out completions where that ratio's geometric mean is beyond R or 1/R (default: none)",
            metavar="R",
            at_least=1,
        ),
    ] = None
    measure_every: Annotated[
        int,
        Flag(
            "steps between measurements on held-out prompts; versions are kept then (default 10)",
            metavar="N",
            at_least=1,
        ),
    ] = 10
    dtype: Annotated[str, Flag("of the engine; the trainer's is float32 (float32)")] = "float32"
    compiled: Annotated[bool, Flag("compile the engine: starts slowly, samples faster")] = False
    max_num_seqs: Annotated[int, Flag("sequences together (default 64)")] = 64
    seed: Annotated[int, Flag()] = 0
    threads: Annotated[int, Flag("of the trainer; sums depend on their number (default 2)", at_least=1)] = 2

    refresh_drafter: Annotated[
        bool, Flag("let the drafter learn from the rollouts", group="a drafter that learns (--refresh-drafter)")
    ] = False
    refresh_every: Annotated[int, Flag("steps between refreshes (default 4)", metavar="N", at_least=1)] = 4
    refresh_steps: Annotated[int, Flag("of training in each (default 40)", metavar="N", at_least=1)] = 40
    refresh_lr: Annotated[float, Flag("AdamW's (default 0.001)", at_least=0)] = 1e-3
    replay: Annotated[int, Flag("rollouts that are kept to learn from (default 512)", metavar="N", at_least=1)] = 512
    greedy_share: Annotated[float, Flag("of greedy answers among them, 0 to 1 (default 0.25)", at_least=0)] = 0.25

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.refresh_drafter and self.draft is None:
            raise FlagError("--refresh-drafter: expected --draft with it, got none; name the drafter to begin with")
        if self.greedy_share > 1:
            raise FlagError(f"--greedy-share: expected 0 to 1, got {self.greedy_share}")
        if self.gamma == ADAPTIVE and self.draft is None:
            raise FlagError("--gamma adaptive: expected --draft with it, got none; name a drafter")

    @property
    def refresh(self) -> RefreshRun | None:
        """What decides about the refreshes; None where the drafter stays as it is."""
        if not self.refresh_drafter:
            return None
        return RefreshRun(
            every=self.refresh_every,
            steps=self.refresh_steps,
            lr=self.refresh_lr,
            replay=self.replay,
            greedy_share=self.greedy_share,
            threads=self.threads,
        )

    @property
    def most(self) -> int | None:
        """γ where it is a number; None for the drafter's most, up to which an adaptive one goes."""
        return self.gamma if isinstance(self.gamma, int) else None

    @property
    def decisive(self) -> GrpoRun:
        """What decides about a run; another run's folder is not continued."""
        return GrpoRun(
            model=self.model,
            draft=self.draft,
            gamma=self.gamma,
            draft_sampling=self.draft_sampling,
            prompts_per_step=self.prompts_per_step,
            group=self.group,
            max_tokens=self.max_tokens,
            lr=self.lr,
            dtype=self.dtype,
            seed=self.seed,
            prompts=os.path.relpath(self.prompts),
            refresh=msgspec.UNSET if self.refresh is None else self.refresh,
        )


class GrpoResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.grpo/1"):
    """A run; `run` is what decided about it."""

    environment: Environment
    run: GrpoRun
    log: tuple[Step, ...]
    held_out_reward: HeldOut


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts to train on, and the held-out ones: of other files."""

    training: list[str]
    held_out: list[str]


def read_prompts(path: Path) -> Prompts:
    """JSON Lines with "id" and "prompt"; what stands before the last ":" of an id (its file) decides the side.

    Raises:
        CheckpointError: no such file, or too few prompts.
    """
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        sides: tuple[list[str], list[str]] = ([], [])
        for item in items:
            sides[is_held_out(str(item["id"]).rpartition(":")[0])].append(str(item["prompt"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = 'expected lines like {"id": "file.py:1", "prompt": "…"}'
        raise CheckpointError(f"{path}: {expected}, got {error!r}; check --prompts") from None
    if not sides[0] or not sides[1]:
        got = f"got {len(sides[0])} and {len(sides[1])}"
        raise CheckpointError(f"{path}: expected prompts to train on and others to hold out, {got}; add some")
    return Prompts(*sides)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(GrpoConfig, argv, prog="scripts/grpo.py", description=__doc__, epilog=EXAMPLES)
    return run_command(
        "grpo.py", lambda: run(config), interrupted="the same command continues from the last saved step"
    )


def run(config: GrpoConfig) -> int:
    """Train, write the result and print it. Returns the exit status."""
    result = train_policy(config)
    from laguna_serve.scripts.training.rl.plot import draw_runs

    (config.out / "grpo.json").write_text(json.dumps(to_json(result)) + "\n", encoding="utf-8")
    draw_runs([config.out], config.out / "reward.png")
    first, last = result.held_out_reward.first, result.held_out_reward.last
    print(f"held-out reward {first:.3f} → {last:.3f} over {config.steps} steps")
    print(json.dumps({key: value for key, value in to_json(result).items() if key != "log"}))
    return HELD if last > first else FELL_SHORT


def train_policy(config: GrpoConfig) -> GrpoResult:
    """Start the service and train, or continue to.

    Raises:
        CommandError: model, prompts or folder cannot be used, or the engine or its rollouts are not as they should be.
    """
    folder = require_folder(config.model)
    prompts = read_prompts(config.prompts)
    if config.prompts_per_step > len(prompts.training):
        expected = f"expected at most {len(prompts.training)}, got {config.prompts_per_step}"
        raise CheckpointError(f"--prompts-per-step: {expected}; {config.prompts} has no more to train on")
    import torch  # like transformers it takes seconds

    from laguna_serve.scripts.training.rl.trainer import Trainer

    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer.open(folder, config.out, lr=config.lr, decisive=config.decisive)
    refresher = open_refresher(config, folder, trainer)
    engine = EngineConfig(
        model=config.model,
        draft=config.draft,
        gamma=config.most,
        adaptive=config.gamma == ADAPTIVE,
        draft_sampling=config.draft_sampling,
        dtype=config.dtype,
        enforce_eager=not config.compiled,
        max_num_seqs=config.max_num_seqs,
        seed=config.seed + trainer.step,  # a run that continues does not draw the same numbers again
        weight_updates=True,
        return_routed_experts=config.replay_experts and not read_target(folder).dense,
    )
    load = OtherLoad()
    announce = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with open_service(engine, config.out / "engine.log", announce) as service:
        log = train(config, folder, service, prompts, trainer, refresher)
    held_out = [step.held_out_reward for step in log if step.held_out_reward is not None]
    return GrpoResult(
        environment=msgspec.structs.replace(read_environment(current_argv()), other_load=load.find_share()),
        run=config.decisive,
        log=tuple(log),
        held_out_reward=HeldOut(first=held_out[0], last=held_out[-1], prompts=len(prompts.held_out)),
    )


def open_refresher(config: GrpoConfig, policy: Path, trainer: Trainer) -> Refresher | None:
    """Open the drafter that learns, as the trainer's state has it. Raises CheckpointError: it cannot be trained."""
    if config.refresh is None or config.draft is None:
        return None
    from laguna_serve.scripts.training.rl.refresh.refresher import Drafting, Refresher

    drafts = "probabilistic" if config.draft_sampling == "probabilistic" else "greedy"
    drafting = Drafting(config.most, config.gamma == ADAPTIVE, drafts)
    draft, out = require_folder(config.draft), config.out / "drafters"
    refresher = Refresher(config.refresh, drafting, policy, draft, out, config.seed)
    if trainer.drafter is not None:
        refresher.load(trainer.drafter)
    return refresher


def train(
    config: GrpoConfig,
    base: Path,
    service: TrainingService,
    prompts: Prompts,
    trainer: Trainer,
    refresher: Refresher | None,
) -> list[Step]:
    """Train, in a loop; returns the log. Interrupted, it leaves what the same command continues from."""
    log, path = trainer.log, config.out / "log.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in log))
    folder, digests = trainer.write()
    serving = None if refresher is None else refresher.serving
    service.push(trainer.version, folder, digests, base, serving, serving)
    with path.open("ab") as file, defer_signals():
        for number in range(trainer.step, config.steps + 1):
            step = Step(step=number, version=trainer.version)
            if number % config.measure_every == 0 or number == config.steps:
                trainer.keep()
                save(trainer, refresher)
                step = measure(config, service, prompts, step)
            if number < config.steps:
                with hold_signals():
                    step = take_step(config, service, prompts, trainer, refresher, step)
            log.append(step)
            file.write(msgspec.json.encode(step) + b"\n")
            file.flush()
            print(f"  {format_step(step)}", file=sys.stderr, flush=True)
            try:
                check_signals()
            except KeyboardInterrupt:
                save(trainer, refresher)
                raise
    return log


def save(trainer: Trainer, refresher: Refresher | None) -> None:
    """Save policy and drafter in one file, whole or not at all, and remove what it does not name any more."""
    trainer.save(None if refresher is None else refresher.dump())
    if refresher is not None:
        refresher.tidy()


def take_step(
    config: GrpoConfig,
    service: TrainingService,
    prompts: Prompts,
    trainer: Trainer,
    refresher: Refresher | None,
    step: Step,
) -> Step:
    """Sample, learn, push; the step with what there is to note of it."""
    watch = Stopwatch(service)
    before = service.count()
    chosen = random.Random(f"{config.seed}/{trainer.step}").sample(prompts.training, config.prompts_per_step)
    watch.start()
    groups = sample(service, chosen, trainer.version, config.group, config.max_tokens)
    watch.stop("rollouts")
    tokens = sum(len(r.token_ids) for g in groups for r in g)
    counted = service.count(before, tokens).since(before)
    note = None
    if refresher is not None:
        watch.start()
        records = [*record(groups, 1.0), *record(ask_greedily(config, service, chosen, trainer.version), 0.0)]
        live = Steps(counted.drafts, counted.accepted_per_position)
        note = refresher.follow(trainer.model, trainer.version, trainer.step, records, live)
        watch.stop("refresh")
    watch.start()
    mismatch = trainer.learn(groups)
    watch.stop("learning")
    watch.start()
    previous = trainer.folder
    folder, digests = trainer.write()
    if refresher is None:
        service.push(trainer.version, folder, digests, previous)
    else:
        service.push(trainer.version, folder, digests, previous, refresher.pending, refresher.serving)
        refresher.arrived()
    watch.stop("push")
    rewards = [rollout.reward for group in groups for rollout in group]
    return msgspec.structs.replace(
        step,
        reward=sum(rewards) / len(rewards),
        mismatch_nats=mismatch.nats,
        tied=TiedTokens(tokens=mismatch.tied_tokens, mismatch_nats=mismatch.tied_nats),
        acceptance_length=find_length(counted),
        tokens=tokens,
        drafts=counted.drafts or None,
        seconds=StepSeconds(**watch.wall_s),
        processor_s=StepSeconds(**watch.processor_s),
        drafter=note,
    )


def ask_greedily(
    config: GrpoConfig, service: TrainingService, chosen: Sequence[str], version: str
) -> list[list[Rollout]]:
    """Ask for greedy answers to a share of a step's prompts."""
    asked = chosen[: math.ceil(config.greedy_share * len(chosen))]
    return sample(service, asked, version, 1, config.max_tokens, temperature=0.0) if asked else []


def record(groups: Sequence[Sequence[Rollout]], temperature: float) -> list[TrafficRecord]:
    """Record rollouts as traffic."""
    return [
        TrafficRecord(
            prompt_token_ids=list(rollout.prompt_ids),
            token_ids=list(rollout.token_ids),
            temperature=temperature,
            weight_version=rollout.version,
        )
        for group in groups
        for rollout in group
    ]


def find_length(counted: Counters) -> float | None:
    """Find the tokens per step that drafted; None where none did."""
    return 1 + counted.accepted_tokens / counted.drafts if counted.drafts else None


def measure(config: GrpoConfig, service: TrainingService, prompts: Prompts, step: Step) -> Step:
    """Mean reward on the held-out prompts, sampled as in training; with a drafter, acceptance of greedy answers."""
    groups = sample(service, prompts.held_out, step.version, HELD_OUT_SAMPLES, config.max_tokens)
    rewards = [rollout.reward for group in groups for rollout in group]
    length = None
    if config.draft is not None:
        before = service.count()
        greedy = sample(service, prompts.held_out, step.version, 1, config.max_tokens, temperature=0.0)
        tokens = sum(len(rollout.token_ids) for group in greedy for rollout in group)
        length = find_length(service.count(before, tokens).since(before))
    return msgspec.structs.replace(step, held_out_reward=sum(rewards) / len(rewards), held_out_greedy_length=length)


def sample(
    service: TrainingService,
    texts: Sequence[str],
    version: str,
    group: int,
    max_tokens: int,
    *,
    temperature: float = 1.0,
) -> list[list[Rollout]]:
    """Sample groups of rollouts, all of one version. Raises RolloutError when they are not."""
    asked = sample_groups(
        service.base_url, service.model_name, texts, group=group, max_tokens=max_tokens, temperature=temperature
    )
    groups = asyncio.run(asked)
    versions = {rollout.version for rollouts in groups for rollout in rollouts}
    if versions != {version}:
        raise RolloutError(
            f"rollouts: expected all of version {version}, got {sorted(versions)}; is another trainer on?"
        )
    return groups


def format_step(step: Step) -> str:
    """Format a step in one line."""
    parts = [f"step {step.step:>4}"]
    named = {"reward": step.reward, "held out": step.held_out_reward, "τ": step.acceptance_length}
    parts += [f"{name} {value:.3f}" for name, value in named.items() if value is not None]
    if step.mismatch_nats is not None and step.tied is not None:
        parts.append(f"mismatch {step.mismatch_nats:.2g}, behind ties {step.tied.mismatch_nats:.2g}")
    if step.seconds is not None:
        parts.append(f"{step.seconds.total:.1f} s")
    if step.drafter is not None:
        parts += describe_drafter(step.drafter)
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
