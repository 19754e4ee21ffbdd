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

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from laguna_serve.evals.problems.splits import is_held_out
from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.loop import Prompts, train
from laguna_serve.scripts.training.rl.service import open_service
from laguna_serve.scripts.training.rl.steps import GrpoRun, HeldOut, Step
from laguna_serve.serving.checkpoint import CheckpointError, read_target, require_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, run_command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.flags import read_flags
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.speculation.flags import ADAPTIVE

if TYPE_CHECKING:
    from laguna_serve.scripts.training.rl.refresh.refresher import Refresher
    from laguna_serve.scripts.training.rl.trainer import Trainer

__all__ = ["GrpoConfig", "GrpoResult", "main", "train_policy"]
EXAMPLES = """examples:
  the toy teacher, four minutes on two cores:
    python scripts/grpo.py --model tests/toy/teacher --draft tests/toy/dflash --out out/grpo
  another seed, more steps:
    python scripts/grpo.py --model tests/toy/teacher --steps 120 --seed 1 --out out/grpo-1
  with a drafter that learns every 3 steps, drafts drawn from its distribution:
    python scripts/grpo.py --model tests/toy/teacher --draft tests/toy/dflash --draft-sampling probabilistic \\
        --refresh-drafter --out out/grpo-refreshed
  one picture of several runs:
    python -m laguna_serve.scripts.training.rl.plot out/grpo out/grpo-1 --out reward.png

Stopped?  Ctrl-C waits for the end of the step and saves it; the same command continues from the last saved step.
exit status: 0 the held-out reward rose, 1 it did not, 2 it could not run, 130 interrupted
"""


class GrpoResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.grpo/1"):
    """A run; `run` is what decided about it."""

    environment: Environment
    run: GrpoRun
    log: tuple[Step, ...]
    held_out_reward: HeldOut


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

    from laguna_serve.scripts.training.rl.importance import Correction
    from laguna_serve.scripts.training.rl.trainer import Trainer

    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    correction = Correction(config.importance_cap, config.drop_beyond)
    trainer = Trainer.open(folder, config.out, lr=config.lr, correction=correction, decisive=config.decisive)
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

    drafting = Drafting(config.most, config.gamma == ADAPTIVE, config.draft_sampling)
    draft, out = require_folder(config.draft), config.out / "drafters"
    refresher = Refresher(config.refresh, drafting, policy, draft, out, config.seed)
    if trainer.drafter is not None:
        refresher.load(trainer.drafter)
    return refresher


if __name__ == "__main__":
    sys.exit(main())
