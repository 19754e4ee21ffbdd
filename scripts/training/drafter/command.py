"""`laguna drafter train`: make or continue a DFlash drafter for any Laguna, from prompts or from recorded traffic.

1. Answers: the target's own to --prompts, asked of --endpoint or of an engine that is started for it, at every
   --temperature; or those recorded in --tokens (JSON Lines of laguna_serve.traffic/1: token ids and nothing else).
2. Hidden states of the target's tapped layers, layer by layer, in shards on disk.
3. Training, and the acceptance on held-out prompts before and after, as vLLM counts it.

Every stage goes on where it was stopped when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.scripts.training.drafter.models import NewDrafter
from laguna_serve.scripts.training.drafter.result import (
    DrafterTrainPlan,
    DrafterTrainResult,
    find_gains,
    format_plan,
    format_result,
)
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds

EXAMPLES = """examples:
  laguna drafter train MODEL --prompts prompts.jsonl --temperature 0 1 --out DIR       an engine is started for the answers
  laguna drafter train MODEL --prompts prompts.jsonl --endpoint http://host:8000 --warm-start DRAFTER --out DIR
  laguna drafter train MODEL --tokens traffic.jsonl --loss dspark --warm-start DRAFTER --out DIR
  laguna drafter train MODEL --prompts prompts.jsonl --format speculators --out DIR --dry-run     what would it take?

--prompts: JSON Lines of {"prompt": text or token ids} or {"messages": […]}.
--tokens: JSON Lines of {"prompt_token_ids": […], "token_ids": […], "temperature": T}; docs/drafter.md has more.
--loss ce trains for greedy drafts, dspark for drafts that are drawn (--draft-sampling probabilistic).
OPENAI_API_KEY is sent to --endpoint if it is set; then name the model with --model.
exit status: 0 trained, 1 trained without a gain on held-out prompts, 2 it could not run, 130 interrupted
"""


def _parse_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError(text)
    return text.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class DrafterTrainConfig:
    """A drafter to make, for what, and of what."""

    target: Annotated[
        str, Flag("what it drafts for: a folder, or a hub id in the local cache", metavar="MODEL", positional=True)
    ]
    out: Annotated[Path, Flag("folder for the drafter", metavar="DIR")]
    prompts: Annotated[Path | None, Flag("prompts that the target answers", metavar="FILE", group="answers")] = None
    tokens: Annotated[tuple[Path, ...], Flag("recorded traffic", metavar="FILE", several=True)] = ()
    endpoint: Annotated[
        str | None, Flag("OpenAI endpoint that serves the target (default: start one)", metavar="URL", parse=_parse_url)
    ] = None
    model: Annotated[str | None, Flag("its name there (default: the first listed)")] = None
    temperature: Annotated[
        tuple[float, ...], Flag("answers to learn from are sampled at (several: a mix)", metavar="T", several=True)
    ] = (0.0,)
    measure: Annotated[
        tuple[float, ...], Flag("temperatures of the held-out answers (default 0 0.7 1)", metavar="T", several=True)
    ] = (0.0, 0.7, 1.0)
    samples: Annotated[int, Flag("answers per prompt at each temperature above 0 (default 1)", at_least=1)] = 1
    max_tokens: Annotated[int, Flag("of an answer (default 256)", metavar="N", at_least=16)] = 256
    ignore_eos: Annotated[bool, Flag("let answers go on past their end")] = False
    max_length: Annotated[int, Flag("of prompt and answer; longer ones are cut (default 4096)", at_least=32)] = 4096
    held_out: Annotated[int, Flag("prompts that are measured on, never learned from (default 64)", at_least=1)] = 64
    recorded_only: Annotated[
        bool, Flag("--tokens: measure on recorded answers, at their temperatures; generate none")
    ] = False
    concurrency: Annotated[int, Flag("answers asked for at once (default 64)", metavar="N", at_least=1)] = 64
    eager: Annotated[bool, Flag("start the engine without compiling: sooner up, slower")] = False

    warm_start: Annotated[
        str | None, Flag("drafter to continue, in its own shape and format", metavar="DRAFTER", group="drafter")
    ] = None
    format: Annotated[Literal["laguna", "speculators"], Flag("of a new drafter (default laguna)")] = "laguna"
    layers: Annotated[int | None, Flag("(default: a third of the target's, 5 at the most)", at_least=1)] = None
    taps: Annotated[
        tuple[int, ...] | None,
        Flag("the target's layers that it reads, counted from 0 (default: 5, evenly spaced)", metavar="L,L,…"),
    ] = None
    width: Annotated[int | None, Flag("of its feed-forward layers (default: 4 × hidden size)", at_least=1)] = None
    heads: Annotated[int | None, Flag("query heads (default: those of the target's first layer)", at_least=1)] = None
    block_size: Annotated[int, Flag("γ + 1 (default 8)", metavar="N", at_least=2)] = 8
    mask_token: Annotated[int | None, Flag("id of a token that is never written (default: the tokenizer's)")] = None
    draft_vocab: Annotated[
        int | None, Flag("speculators: tokens it can draft, the most frequent ones (default 32000)", at_least=2)
    ] = None

    loss: Annotated[Literal["ce", "dspark"], Flag("default ce", group="training")] = "ce"
    steps: Annotated[int, Flag("default 2000", metavar="N", at_least=1)] = 2000
    lr: Annotated[float, Flag("AdamW's peak (default 0.001)", at_least=0)] = 1e-3
    rows: Annotated[int, Flag("answers per step (default 8)", metavar="N", at_least=1)] = 8
    anchors: Annotated[int, Flag("blocks in each of them (default 20)", metavar="N", at_least=1)] = 20
    decay: Annotated[
        float | None, Flag("places after which a position's weight is 1/e (default: half a block)", at_least=0.1)
    ] = None
    device: Annotated[Literal["cpu", "cuda"], Flag("default cpu")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], Flag("the target is computed in (default float32)")] = "float32"
    seed: Annotated[int, Flag()] = 0
    work: Annotated[Path | None, Flag("folder for answers, states and training (default: DIR/work)")] = None
    dry_run: Annotated[bool, Flag("say what it takes; generate, compute and write nothing")] = False

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if (self.prompts is None) == (not self.tokens):
            got = "both" if self.tokens else "neither"
            raise FlagError(f"--prompts and --tokens: expected one of them, got {got}; pass where answers come from")
        if self.recorded_only and not self.tokens:
            raise FlagError("--recorded-only: expected --tokens with it, got --prompts; leave it out")
        for name, values in (("--temperature", self.temperature), ("--measure", self.measure)):
            if not values or not all(0 <= value < 100 for value in values) or len(set(values)) != len(values):
                raise FlagError(f"{name}: expected different temperatures from 0 on, got {values}; for example 0 1")
        if self.draft_vocab is not None and self.format == "laguna" and self.warm_start is None:
            raise FlagError("--draft-vocab: expected --format speculators with it, got laguna, which drafts every token")
        shaped = [name for name in ("layers", "taps", "width", "heads", "mask_token", "draft_vocab") if self._has(name)]
        if self.warm_start is not None and shaped:
            flag = "--" + shaped[0].replace("_", "-")
            raise FlagError(f"{flag}: expected the shape that --warm-start has, got another; leave it out")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def new(self) -> NewDrafter:
        """The drafter that is made where none is continued."""
        names = ("format", "layers", "taps", "width", "heads", "block_size", "mask_token", "draft_vocab")
        return NewDrafter(**{name: getattr(self, name) for name in names})

    @property
    def work_folder(self) -> Path:
        """Where the stages keep what they have."""
        return self.work or self.out / "work"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("laguna drafter train", DrafterTrainConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(argv, act, show=_show, line=Brief(first={"log": 0}), judge=_judge)


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


def _judge(result: DrafterTrainPlan | DrafterTrainResult) -> int:
    if isinstance(result, DrafterTrainPlan):
        return HELD
    return HELD if max(find_gains(result), default=0.0) > 0 else FELL_SHORT


if __name__ == "__main__":
    sys.exit(main())
