"""Which drafter to make, of what, and how: the flags of `laguna drafter train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds


def _parse_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError(text)
    return text.rstrip("/")


Format = Literal["laguna", "speculators"]


@dataclass(frozen=True, slots=True)
class NewDrafter:
    """What a new drafter is to be; None leaves it to the target.

    Attributes:
        taps: the target's layers whose states it reads, counted from 0.
        mask_token: what stands in the block's open places, a token that is never written.
        draft_vocab: of the speculators format, how many of the target's tokens it can draft.
        head_rank: of its sequential head, where it is to have one.
    """

    format: Format = "laguna"
    layers: int | None = None
    taps: tuple[int, ...] | None = None
    width: int | None = None
    heads: int | None = None
    block_size: int = 8
    mask_token: int | None = None
    draft_vocab: int | None = None
    head_rank: int | None = None


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
    sequential_head: Annotated[
        int | None,
        Flag("rank of a head that drafts a block's places one after the other, such as 64", metavar="RANK", at_least=1),
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
    threads: Annotated[
        int, Flag("on a CPU (default 2); sums depend on their number", at_least=1, at_most=MOST_THREADS)
    ] = 2
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = 0
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
            raise FlagError(
                "--draft-vocab: expected --format speculators with it, got laguna, which drafts every token"
            )
        if self.sequential_head is not None and self.format == "speculators":
            raise FlagError("--sequential-head: expected --format laguna with it, got speculators; leave one out")
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
        return NewDrafter(**{name: getattr(self, name) for name in names}, head_rank=self.sequential_head)

    @property
    def work_folder(self) -> Path:
        """Where the stages keep what they have."""
        return self.work or self.out / "work"
