"""Train a policy by GRPO against a served model: sample, reward, one step of gradient, new weights into the engine.

A small, whole example of an RL loop on this project's parts: rollouts come from the gateway, in groups that share a
prompt; the trainer is plain PyTorch; every version goes back through the gateway's /admin/update_weights from a folder
(plugins/weight_folder.py), and every rollout is checked to be of the version that it was asked of.  The reward
(evals/codegen/syntax_reward.py) is one that a model of a few million parameters can raise.  A drafter, if one is given,
speculates for the policy all along and stays as it was: its acceptance is noted per version.

Before every step it is noted how far trainer and engine are apart on the sampled tokens, apart from those behind a tie
of two experts (scripts/training/rl/mismatch.py): rounding alone, if the engine has the trainer's weights.

DIR gets log.jsonl (a line per step), state.pt (to continue from), versions/ (checkpoints), and grpo.json, reward.png.
The last stdout line is one JSON object (schema laguna_serve.grpo/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laguna_serve.evals.problems.splits import is_held_out
from laguna_serve.scripts.training.rl.rollouts import Rollout, RolloutError, sample_groups
from laguna_serve.scripts.training.rl.service import Service, open_service
from laguna_serve.serving.checkpoint import CheckpointError, require_folder
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import Parser, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.speculation.acceptance import read_acceptance
from laguna_serve.serving.speculation.drafting import add_draft_sampling

if TYPE_CHECKING:
    from laguna_serve.scripts.training.rl.trainer import Trainer

SCHEMA = "laguna_serve.grpo/1"
ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_SAMPLES = 2  # completions of each held-out prompt
EXAMPLES = """examples:
  the toy teacher, four minutes on two cores:
    python scripts/grpo.py --model tests/toy/teacher --draft tests/toy/dflash --out out/grpo
  another seed, more steps:
    python scripts/grpo.py --model tests/toy/teacher --steps 120 --seed 1 --out out/grpo-1
  one picture of several runs:
    python -m laguna_serve.scripts.training.rl.plot out/grpo out/grpo-1 --out reward.png

Stopped?  The same command continues from the last saved step.
exit status: 0 the held-out reward rose, 1 it did not, 2 it could not run, 130 interrupted
"""


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


def train(args: argparse.Namespace, service: Service, prompts: Prompts, trainer: Trainer) -> list[dict[str, Any]]:
    """The loop; returns the log. Interrupted, it leaves what the same command continues from."""
    log, path = trainer.log, args.out / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    folder, digests = trainer.write()
    service.push(trainer.version, folder, digests, previous=args.folder)
    with path.open("a", encoding="utf-8") as file:
        for step in range(trainer.step, args.steps + 1):
            record: dict[str, Any] = {"step": step, "version": trainer.version}
            if step % args.measure_every == 0 or step == args.steps:
                trainer.save()
                record["held_out_reward"] = measure(args, service, prompts, trainer.version)
            if step < args.steps:
                record |= take_step(args, service, prompts, trainer)
            log.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"  {tell(record)}", file=sys.stderr, flush=True)
    return log


def take_step(args: argparse.Namespace, service: Service, prompts: Prompts, trainer: Trainer) -> dict[str, Any]:
    """Sample, learn, push; what there is to note of it."""
    started = time.monotonic()
    before = read_acceptance(service.engine_url)
    chosen = random.Random(f"{args.seed}/{trainer.step}").sample(prompts.training, args.prompts_per_step)
    groups = sample(service, chosen, trainer.version, args.group, args.max_tokens)
    after = read_acceptance(service.engine_url)
    sampled = time.monotonic()
    mismatch = trainer.learn(groups)
    learnt = time.monotonic()
    previous = trainer.folder
    folder, digests = trainer.write()
    service.push(trainer.version, folder, digests, previous)
    rewards = [rollout.reward for group in groups for rollout in group]
    seconds = {"rollouts": sampled - started, "learning": learnt - sampled, "push": time.monotonic() - learnt}
    record: dict[str, Any] = {"reward": sum(rewards) / len(rewards), "mismatch_nats": mismatch.nats}
    record["tied"] = {"tokens": mismatch.tied_tokens, "mismatch_nats": mismatch.tied_nats}
    if before is not None and after is not None and after.drafts > before.drafts:
        record["acceptance_length"] = 1 + (after.accepted - before.accepted) / (after.drafts - before.drafts)
    return record | {"tokens": sum(len(r.token_ids) for g in groups for r in g), "seconds": seconds}


def measure(args: argparse.Namespace, service: Service, prompts: Prompts, version: str) -> float:
    """Mean reward on the held-out prompts, sampled as in training."""
    groups = sample(service, prompts.held_out, version, HELD_OUT_SAMPLES, args.max_tokens)
    rewards = [rollout.reward for group in groups for rollout in group]
    return sum(rewards) / len(rewards)


def sample(service: Service, texts: Sequence[str], version: str, group: int, max_tokens: int) -> list[list[Rollout]]:
    """Groups of rollouts, all of one version. Raises RolloutError when they are not."""
    asked = sample_groups(service.base_url, service.model_name, texts, group=group, max_tokens=max_tokens)
    groups = asyncio.run(asked)
    versions = {rollout.version for found in groups for rollout in found}
    if versions != {version}:
        raise RolloutError(
            f"rollouts: expected all of version {version}, got {sorted(versions)}; is another trainer on?"
        )
    return groups


def tell(record: dict[str, Any]) -> str:
    """A step in one line."""
    parts = [f"step {record['step']:>4}"]
    names = {"reward": "reward", "held_out_reward": "held out", "acceptance_length": "τ", "mismatch_nats": "mismatch"}
    for key, name in names.items():
        if key in record:
            parts.append(f"{name} {record[key]:.2g}" if key == "mismatch_nats" else f"{name} {record[key]:.3f}")
    if "seconds" in record:
        parts.append(f"{sum(record['seconds'].values()):.1f} s")
    return "  ".join(parts)


def run(args: argparse.Namespace) -> int:
    """Start the service, train, write the result."""
    args.folder = require_folder(args.model)
    prompts = read_prompts(args.prompts)
    if args.prompts_per_step > len(prompts.training):
        expected = f"expected at most {len(prompts.training)}, got {args.prompts_per_step}"
        raise CheckpointError(f"--prompts-per-step: {expected}; {args.prompts} has no more to train on")
    from laguna_serve.scripts.training.rl.plot import draw_runs
    from laguna_serve.scripts.training.rl.trainer import Trainer  # torch and transformers take seconds to import

    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer.open(args.folder, args.out, lr=args.lr, decisive=list_decisive(args))
    config = EngineConfig(
        model=args.model,
        draft=args.draft,
        gamma=args.gamma,
        draft_sampling=args.draft_sampling,
        dtype=args.dtype,
        enforce_eager=not args.compiled,
        max_num_seqs=args.max_num_seqs,
        seed=args.seed + trainer.step,  # a run that continues does not draw the same numbers again
        weight_updates=True,
    )
    announce = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with open_service(config, args.out / "engine.log", announce) as service:
        log = train(args, service, prompts, trainer)
    held_out = [line["held_out_reward"] for line in log if "held_out_reward" in line]
    result = {
        "schema": SCHEMA,
        "environment": describe_environment(current_argv()),
        "run": list_decisive(args),
        "log": log,
    }
    result["held_out_reward"] = {"first": held_out[0], "last": held_out[-1], "prompts": len(prompts.held_out)}
    (args.out / "grpo.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw_runs([args.out], args.out / "reward.png")
    print(f"held-out reward {held_out[0]:.3f} → {held_out[-1]:.3f} over {args.steps} steps")
    print(json.dumps({key: value for key, value in result.items() if key != "log"}))
    return 0 if held_out[-1] > held_out[0] else 1


def list_decisive(args: argparse.Namespace) -> dict[str, Any]:
    """What decides about a run; another run's folder is not continued."""
    sizes = ("prompts_per_step", "group", "max_tokens")
    names = ("model", "draft", "gamma", "draft_sampling", *sizes, "lr", "dtype", "seed")
    return {name: vars(args)[name] for name in names} | {"prompts": os.path.relpath(args.prompts)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="scripts/grpo.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--model", metavar="M", required=True, help="Laguna checkpoint to start from: a folder")
    parser.add_argument("--draft", metavar="D", help="DFlash drafter that speculates for it")
    parser.add_argument("--gamma", type=int, metavar="N", help="tokens proposed per step (default: the most)")
    add_draft_sampling(parser)
    prompts = 'JSON Lines with "id" and "prompt"; a quarter of the files is held out (default: the toy prompts)'
    parser.add_argument("--prompts", type=Path, default=ROOT / "tests/toy/prompts.jsonl", help=prompts)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for log, state and versions")
    parser.add_argument("--steps", type=int, default=60, help="default %(default)s")
    parser.add_argument("--prompts-per-step", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--group", type=int, default=8, metavar="N", help="completions per prompt (default %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="of a completion (default %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="AdamW's (default %(default)s)")
    measured = "steps between measurements on held-out prompts; versions are kept then (default %(default)s)"
    parser.add_argument("--measure-every", type=int, default=10, metavar="N", help=measured)
    parser.add_argument("--dtype", default="float32", help="of the engine; the trainer's is float32 (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compile the engine: starts slowly, samples faster")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in {"steps": 1, "prompts_per_step": 1, "group": 2, "max_tokens": 2, "measure_every": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command("grpo", lambda: run(args), interrupted="the same command continues from the last saved step")


if __name__ == "__main__":
    sys.exit(main())
