"""The loop of a GRPO run: sample, learn, push, and note what there is to note, so that it can be stopped anywhere."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.refresh.live import Steps
from laguna_serve.scripts.training.rl.refresh.notes import describe_drafter
from laguna_serve.scripts.training.rl.rollouts import Rollout, RolloutError, record_traffic, sample_groups
from laguna_serve.scripts.training.rl.service import TrainingService
from laguna_serve.scripts.training.rl.steps import Step, StepSeconds, TiedTokens
from laguna_serve.scripts.training.rl.stopwatch import Stopwatch
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.kit.signals import check_signals, defer_signals, hold_signals

if TYPE_CHECKING:
    from laguna_serve.scripts.training.rl.refresh.refresher import Refresher
    from laguna_serve.scripts.training.rl.trainer import Trainer

HELD_OUT_SAMPLES = 2  # completions of each held-out prompt


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts to train on, and the held-out ones: of other files."""

    training: list[str]
    held_out: list[str]


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
            if number < config.steps:  # behind the last line nothing is left to continue
                stop_if_asked(trainer, refresher)
    return log


def stop_if_asked(trainer: Trainer, refresher: Refresher | None) -> None:
    """Save before a signal ends the run. Raises KeyboardInterrupt once one has come."""
    try:
        check_signals()
    except KeyboardInterrupt:
        save(trainer, refresher)
        raise


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
        records = [
            *record_traffic(groups, 1.0),
            *record_traffic(ask_greedily(config, service, chosen, trainer.version), 0.0),
        ]
        live = Steps(counted.drafts, counted.accepted_per_position)
        note = refresher.follow(trainer.model, trainer.version, trainer.step, records, live)
        watch.stop("refresh")
    watch.start()
    mismatch, off_policy = trainer.learn(groups)
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
        off_policy=off_policy,
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
