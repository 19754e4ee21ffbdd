"""Train a policy by GRPO against a served model: sample, reward, one step of gradient, new weights into the engine.

A small, whole example of an RL loop on this project's parts: rollouts come from the gateway, in groups that share a
prompt; the trainer is plain PyTorch; every version goes back through the gateway's /admin/update_weights from a folder
(plugins/weight_folder.py), and every rollout is checked to be of the version that it was asked of. The reward
(evals/codegen/syntax_reward.py) is one that a model of a few million parameters can raise. A drafter, if one is given,
speculates for the policy all along and stays as it was, or, with --refresh-drafter, learns beside it from the rollouts
(scripts/training/rl/refresh): its acceptance is noted per version.

The trainer replays the engine's choice of experts, and a token's weight is the ratio of trainer's and engine's
probability, up to a cap. Before every step it is noted how far the two are apart on the sampled tokens, apart from
those behind a tie of two experts: rounding alone, if the engine has the trainer's weights
(scripts/training/rl/off_policy).

DIR gets log.jsonl (a line per step), state.pt (to continue from), sources.json (digests of model and drafter),
versions/ (checkpoints), drafters/ (the serving one), and grpo.json, reward.png.
The last stdout line is one JSON object (schema laguna_serve.grpo/1).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.run import RESULT, GrpoResult, find_finished, train_policy
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result, run_command
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.results import to_json, write_result

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        GrpoConfig, argv, prog="scripts/grpo.py", description=__doc__, epilog=EXAMPLES
    )
    return run_command(
        "grpo.py", lambda: run(config, always_json), interrupted="the same command continues from the last saved step"
    )


def run(config: GrpoConfig, always_json: bool) -> int:
    """Train, write the result and print it; what is finished is printed again. Returns the exit status."""
    result = find_finished(config)
    if result is None:
        result = train_policy(config)
        write_result(config.out / RESULT, result)
        from laguna_serve.scripts.training.rl.plot import draw_runs

        draw_runs([config.out], config.out / "reward.png")
    first, last = result.held_out_reward.first, result.held_out_reward.last
    text = f"held-out reward {first:.3f} → {last:.3f} over {config.steps} steps"
    line = {key: value for key, value in to_json(result).items() if key != "log"}
    print_result(text, line, config.out, always_json=always_json)
    return HELD if last > first else FELL_SHORT


if __name__ == "__main__":
    sys.exit(main())
