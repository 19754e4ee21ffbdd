"""A GRPO run from its configuration to its result: prompts, trainer, service, loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from laguna_serve.evals.problems.splits import is_held_out
from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.loop import Prompts, train
from laguna_serve.scripts.training.rl.service import open_service
from laguna_serve.scripts.training.rl.sources import check_sources, note_sources
from laguna_serve.scripts.training.rl.steps import GrpoRun, HeldOut, Step
from laguna_serve.serving.checkpoint import CheckpointError, read_target, require_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import is_whole, number_lines
from laguna_serve.serving.kit.results import ResultError, read_result
from laguna_serve.serving.kit.run_dir import check_out, hold_folder
from laguna_serve.serving.speculation.flags import ADAPTIVE

if TYPE_CHECKING:
    from laguna_serve.scripts.training.rl.refresh.refresher import Refresher
    from laguna_serve.scripts.training.rl.trainer import Trainer

RESULT = "grpo.json"


class GrpoResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.grpo/1"):
    """A run; `run` is what decided about it."""

    environment: Environment
    run: GrpoRun
    log: tuple[Step, ...]
    held_out_reward: HeldOut


def find_finished(config: GrpoConfig) -> GrpoResult | None:
    """Read the result of this very run where it has come to its end.

    Another pass of its last step would draw its answers, and so its held-out reward, anew.

    Raises:
        CheckpointError: its model or its drafter was written anew since.
    """
    try:
        found = read_result(config.out / RESULT, GrpoResult)
    except ResultError:  # none, or one of an earlier form: the run's own state decides
        return None
    if found.run != config.decisive or len(found.log) != config.steps + 1:
        return None
    check_sources(config.out, config.sources)
    return found


def read_prompts(path: Path) -> Prompts:
    """JSON Lines with "id" and "prompt"; what stands before the last ":" of an id (its file) decides the side.

    Raises:
        CheckpointError: no such file, or too few prompts.
    """
    try:
        items = [json.loads(line) for _, line in number_lines(path)]
        sides: tuple[list[str], list[str]] = ([], [])
        for item in items:
            if not isinstance(item["prompt"], str) or not is_whole(item["prompt"]):
                raise TypeError(f"the prompt {item['prompt']!r} of {item['id']}")
            sides[is_held_out(str(item["id"]).rpartition(":")[0])].append(item["prompt"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = 'expected lines like {"id": "file.py:1", "prompt": "…"}'
        raise CheckpointError(f"{path}: {expected}, got {error!r}; check --prompts") from None
    if not sides[0] or not sides[1]:
        got = f"got {len(sides[0])} and {len(sides[1])}"
        raise CheckpointError(f"{path}: expected prompts to train on and others to hold out, {got}; add some")
    return Prompts(*sides)


def train_policy(config: GrpoConfig) -> GrpoResult:
    """Start the service and train, or continue to.

    Raises:
        CommandError: model, prompts or folder cannot be used, or the engine or its rollouts are not as they should be.
    """
    check_out(config.out)
    folder = require_folder(config.model)
    prompts = read_prompts(config.prompts)
    if config.prompts_per_step > len(prompts.training):
        expected = f"expected at most {len(prompts.training)}, got {config.prompts_per_step}"
        raise CheckpointError(f"--prompts-per-step: {expected}; {config.prompts} has no more to train on")
    with hold_folder(config.out):
        return _train(config, folder, prompts)


def _train(config: GrpoConfig, folder: Path, prompts: Prompts) -> GrpoResult:
    import torch  # like transformers it takes seconds

    from laguna_serve.scripts.training.rl.off_policy.importance import Correction
    from laguna_serve.scripts.training.rl.trainer import Trainer

    torch.set_num_threads(config.threads)
    correction = Correction(config.importance_cap, config.drop_beyond)
    trainer = Trainer.open(folder, config.out, lr=config.lr, correction=correction, decisive=config.decisive)
    if trainer.step > config.steps:
        expected = f"expected at least {trainer.step} --steps, as many as it has taken, got {config.steps}"
        raise CheckpointError(f"{config.out}: {expected}; give them, or choose another --out")
    if trainer.log or trainer.step:
        check_sources(config.out, config.sources)
        print(f"continuing at step {trainer.step} of {config.steps}", file=sys.stderr, flush=True)
    else:
        note_sources(config.out, config.sources)
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
        environment=load.note(read_environment(current_argv())),
        run=config.decisive,
        log=tuple(log),
        held_out_reward=HeldOut(first=held_out[0], last=held_out[-1], prompts=len(prompts.held_out)),
    )


def open_refresher(config: GrpoConfig, policy: Path, trainer: Trainer) -> Refresher | None:
    """Open the drafter that learns, as the trainer's state has it. Raises CheckpointError: it cannot be trained."""
    if config.refresh is None or config.draft is None:
        return None
    from laguna_serve.scripts.training.rl.refresh.refresher import Drafting, Refresher

    drafting = Drafting(config.most, config.gamma == ADAPTIVE, config.draft_sampling)
    draft, out = require_folder(config.draft), config.out / "drafters"
    refresher = Refresher(config.refresh, drafting, policy, draft, out, config.seed)
    if trainer.drafter is not None:
        refresher.load(trainer.drafter)
    return refresher
