"""`laguna drafter train`: make or continue a DFlash drafter for a model, from prompts or from recorded traffic.

1. Answers: the target's own to --prompts, asked of --endpoint or of an engine that is started for it, at every
   --temperature; or those recorded in --tokens (JSON Lines of laguna_serve.traffic/1: token ids and nothing else).
2. Hidden states of the target's tapped layers, layer by layer, in shards on disk.
3. Training, and the acceptance on held-out prompts before and after, as vLLM counts it.

Every stage goes on where it was stopped when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.result import (
    DrafterTrainPlan,
    DrafterTrainResult,
    find_gains,
    format_plan,
    format_result,
)
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.results import JsonObject, to_json

EXAMPLES = """examples:
  laguna drafter train MODEL --prompts prompts.jsonl --temperature 0 1 --out DIR       starts an engine for the answers
  laguna drafter train MODEL --prompts prompts.jsonl --endpoint http://host:8000 --warm-start DRAFTER --out DIR
  laguna drafter train MODEL --tokens traffic.jsonl --loss dspark --warm-start DRAFTER --out DIR
  laguna drafter train MODEL --tokens traffic.jsonl --loss dspark --warm-start DRAFTER --sequential-head 64 --out DIR
  laguna drafter train MODEL --prompts prompts.jsonl --format speculators --out DIR --dry-run     what would it take?

--prompts: JSON Lines of {"prompt": text or token ids} or {"messages": […]}.
--tokens: JSON Lines of {"prompt_token_ids": […], "token_ids": […], "temperature": T}; docs/drafter.md has more.
--loss ce trains for greedy drafts, dspark for drafts that are drawn (--draft-sampling probabilistic).
OPENAI_API_KEY is sent to --endpoint if it is set; then name the model with --model.
exit status: 0 trained, 1 trained without a gain on held-out prompts, 2 it could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("laguna drafter train", DrafterTrainConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(argv, act, show=_show, line=_line, judge=_judge)


def act(config: DrafterTrainConfig) -> DrafterTrainPlan | DrafterTrainResult:
    """Train, or say what it would take. Raises as `train_drafter`."""
    return plan_drafter(config) if config.dry_run else train_drafter(config)


def plan_drafter(config: DrafterTrainConfig) -> DrafterTrainPlan:
    """Say what training takes; nothing is generated, computed or written.

    Raises:
        CheckpointError, PromptsError, TrafficError: target, drafter, prompts or tokens cannot be used.
    """
    from laguna_serve.scripts.training.drafter.stages import open_run

    return open_run(config).plan()


def train_drafter(config: DrafterTrainConfig) -> DrafterTrainResult:
    """Make or continue a drafter, or go on with what was stopped.

    Raises:
        CheckpointError, PromptsError, TrafficError: target, drafter, prompts, tokens or output cannot be used.
        EngineError, EndpointError: there are no answers. RunDirError: the work folder is another run's.
    """
    from laguna_serve.scripts.training.drafter.stages import open_run

    return open_run(config).train()


def _show(result: DrafterTrainPlan | DrafterTrainResult) -> str:
    return format_plan(result) if isinstance(result, DrafterTrainPlan) else format_result(result)


def _line(result: DrafterTrainPlan | DrafterTrainResult) -> JsonObject:
    """Leave out the log, which the file has."""
    return {key: value for key, value in to_json(result).items() if key != "log"}


def _judge(result: DrafterTrainPlan | DrafterTrainResult) -> int:
    if isinstance(result, DrafterTrainPlan):
        return HELD
    return HELD if max(find_gains(result), default=0.0) > 0 else FELL_SHORT


if __name__ == "__main__":
    sys.exit(main())
