"""A teacher, its student's widths, what both learn on and how: the flags of `scripts/distill_dense.py`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from laguna_serve.scripts.training.optimiser import Moments
from laguna_serve.serving.kit.flags import MOST_SEED, MOST_THREADS, Flag, FlagError, check_bounds

FULL = "full"


def parse_width(text: str) -> tuple[int, int]:
    """LAYER=N: a layer and its width."""
    layer, separator, width = text.partition("=")
    if not separator or not layer.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"expected LAYER=N, got {text!r}; for example 3=613")
    return int(layer), int(width)


def _parse_top_k(text: str) -> int:
    """Read K; 0 is the whole vocabulary."""
    if text != FULL and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number of tokens or {FULL!r}, got {text!r}; for example 32")
    return 0 if text == FULL else int(text)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the outcome besides teacher and text.

    A batch is rows × length tokens, a function of seed, stage and step; log_every is in steps.

    Attributes:
        stage1_batches, stage2_batches: after so many steps batches come again; 0: never.
        accumulate: parts that a process computes its share of a batch in.
        weights: dtype of the student in stage 2; masters and moments are fp32.
        moments: of stage 2's AdamW; 8bit: torchao's.
        fsdp: in stage 2 weights, gradients and moments are shared out among the processes.
        checkpointing: activations of stage 2 are made again, layer by layer, in the backward pass.
        logit_chunk: places whose logits exist at a time in stage 2; 0: all of a part's.
        stage2_on: chats, on the assistant's tokens, or plain text, on every token.
    """

    seed: int
    stage1_steps: int
    stage2_steps: int
    rows: int
    length: int
    log_every: int = 10
    init: Literal["usage", "weight", "concat", "random"] = "usage"
    stage1_lr: float = 3e-3
    stage2_lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warm_up: int = 100
    stage1_batches: int = 0
    stage2_batches: int = 0
    stage2_on: Literal["chats", "text"] = "chats"
    accumulate: int = 1
    weights: Literal["float32", "bfloat16"] = "float32"
    moments: Moments = "float32"
    fsdp: bool = False
    checkpointing: bool = False
    logit_chunk: int = 0

    def batch_of(self, stage: int, step: int) -> str:
        """Name the batch of a step, which is drawn by its name."""
        batches = self.stage1_batches if stage == 1 else self.stage2_batches
        return f"{self.seed}/{stage}/{step % batches if batches else step}"


DEFAULT = Recipe(seed=0, stage1_steps=800, stage2_steps=1200, rows=6, length=384)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher, its student's widths, what both learn on, and for how long.

    Attributes:
        width: (layer, units) of layers that get another width than their cost asks for.
    """

    teacher: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id that is in the local cache", positional=True)
    ]
    out: Annotated[Path, Flag("folder for the student")]
    report: Annotated[Path | None, Flag("folder for distillation.json and the pictures (default: --out)")] = None
    work: Annotated[Path | None, Flag("training states, to continue from (default: .cache/distill-…)")] = None
    fresh: Annotated[bool, Flag("forget what the work folder holds")] = False
    text: Annotated[str, Flag("stage 1: .txt, .jsonl with text or prompt, or toy:training (default)")] = "toy:training"
    chats: Annotated[str, Flag('stage 2: .jsonl with {"messages": […]}, or toy:training (default)')] = "toy:training"
    width: Annotated[
        tuple[tuple[int, int], ...],
        Flag(
            "another width for a layer: any for a sparse one, a larger one for a dense one (repeatable)",
            metavar="LAYER=N",
            parse=parse_width,
            repeated=True,
        ),
    ] = ()
    stage1_steps: Annotated[int, Flag(f"default {DEFAULT.stage1_steps}", at_least=1)] = DEFAULT.stage1_steps
    stage2_steps: Annotated[int, Flag(f"default {DEFAULT.stage2_steps}", at_least=1)] = DEFAULT.stage2_steps
    rows: Annotated[int, Flag(f"sequences in a batch (default {DEFAULT.rows})", at_least=1)] = DEFAULT.rows
    length: Annotated[int, Flag(f"tokens in a sequence (default {DEFAULT.length})", at_least=2)] = DEFAULT.length
    measure_tokens: Annotated[int, Flag("held-out tokens to measure the loss on (default 65536)", metavar="N")] = 65_536
    held_out_text: Annotated[
        str | None,
        Flag("text to measure the loss on (default: the toy's other half, or one in fifty documents of --text)"),
    ] = None
    held_out_chats: Annotated[
        str | None, Flag("conversations to measure on (default: the toy's other half, or one in fifty of --chats)")
    ] = None
    dtype: Annotated[Literal["bfloat16", "float32"], Flag("stored as (bfloat16)")] = "bfloat16"
    seed: Annotated[int, Flag(at_least=0, at_most=MOST_SEED)] = DEFAULT.seed

    init: Annotated[
        Literal["usage", "weight", "concat", "random"],
        Flag("experts that a block starts as, and their shares (default usage; docs/dense.md)", group="training"),
    ] = DEFAULT.init
    stage1_lr: Annotated[float, Flag(f"AdamW's peak (default {DEFAULT.stage1_lr})", at_least=0)] = DEFAULT.stage1_lr
    stage2_lr: Annotated[float, Flag(f"AdamW's peak (default {DEFAULT.stage2_lr})", at_least=0)] = DEFAULT.stage2_lr
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Flag("of the rate after the warm-up (default cosine)")
    ] = DEFAULT.schedule
    warm_up: Annotated[int, Flag(f"steps (default {DEFAULT.warm_up})", metavar="N", at_least=0)] = DEFAULT.warm_up
    stage1_batches: Annotated[
        int, Flag("batches that stage 1 goes through again and again (default: a new one every step)", at_least=0)
    ] = 0
    stage2_batches: Annotated[int, Flag("likewise of stage 2, and so of the store (default: likewise)", at_least=0)] = 0
    stage2_on: Annotated[
        Literal["chats", "text"], Flag("stage 2: the assistant's tokens of --chats (default), or all of --text")
    ] = "chats"
    accumulate: Annotated[
        int, Flag("stage 2: parts that a process computes its rows in (default 1)", metavar="N", at_least=1)
    ] = 1
    weights: Annotated[
        Literal["float32", "bfloat16"], Flag("stage 2 computes in (default float32; master weights stay fp32)")
    ] = "float32"
    moments: Annotated[Moments, Flag("of stage 2's AdamW (default float32; 8bit wants .venv-train)")] = "float32"
    fsdp: Annotated[bool, Flag("stage 2: share weights, gradients and moments out among the processes")] = False
    checkpointing: Annotated[bool, Flag("stage 2: make activations again in the backward pass")] = False
    logit_chunk: Annotated[
        int, Flag("stage 2: places whose logits exist at a time (default: all)", metavar="N", at_least=0)
    ] = 0
    curve_every: Annotated[
        int,
        Flag(
            "stage 2: held-out figures, and whether answers stop, every N steps (default: not)", metavar="N", at_least=0
        ),
    ] = 0
    threads: Annotated[
        int, Flag("on a CPU (default 2); sums depend on their number", metavar="N", at_least=1, at_most=MOST_THREADS)
    ] = 2

    layerwise: Annotated[
        bool, Flag("read the teacher's shards a layer at a time, never whole", group="a teacher of any size")
    ] = False
    store: Annotated[
        Path | None, Flag("stage 2 learns from the teacher's top-K logits in DIR, written first", metavar="DIR")
    ] = None
    top_k: Annotated[
        int, Flag(f"tokens of the store, or {FULL} (default 32)", metavar="K", parse=_parse_top_k, at_least=0)
    ] = 32
    endpoint: Annotated[
        str | None, Flag("vLLM that serves the teacher, to ask for the store's logits", metavar="URL")
    ] = None
    model: Annotated[str | None, Flag("the teacher's name there (default: the first listed)")] = None
    only_store: Annotated[bool, Flag("write the store and end")] = False
    dry_run: Annotated[
        bool, Flag("say what memory, disk and time it takes, from config.json alone; read and write nothing")
    ] = False
    tflops: Annotated[float, Flag("--dry-run: a device's peak (default 989, an H100's in bf16)", metavar="T")] = 989.0
    mfu: Annotated[
        float, Flag("--dry-run: share of it that training a dense model reaches (default 0.33)", metavar="SHARE")
    ] = 0.33
    teacher_mfu: Annotated[
        float, Flag("--dry-run: share of it that a sparse teacher reaches (default 0.2)", metavar="SHARE")
    ] = 0.2
    measure: Annotated[
        bool, Flag("--dry-run: time a few layers on the device at hand instead, with random weights of this size")
    ] = False

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        for flag, value in (("--endpoint", self.endpoint), ("--only-store", self.only_store)):
            if value and self.store is None:
                raise FlagError(f"{flag}: expected --store with it, got none; name a folder for the logits")
        if self.fsdp and self.curve_every:
            raise FlagError("--curve-every: expected none with --fsdp, where no process has the whole student")
        if self.fsdp and self.moments != "float32":
            raise FlagError("--moments: expected float32 with --fsdp, which shares them out already, got 8bit")
        for flag, share in (("--mfu", self.mfu), ("--teacher-mfu", self.teacher_mfu)):
            if not (0 < share <= 1 and self.tflops > 0):
                raise FlagError(f"{flag}, --tflops: expected a share and a rate, got {share} of {self.tflops}")
        if self.measure and not self.dry_run:
            raise FlagError("--measure: expected --dry-run with it, got none; pass both")
        if self.accumulate > self.rows:
            raise FlagError(f"--accumulate: expected at most --rows {self.rows}, got {self.accumulate}; lower it")

    def check_processes(self, count: int) -> None:
        """Refuse what so many processes cannot do together. Raises FlagError."""
        if count > 1 and not (self.layerwise and self.store):
            got = f"{count} processes without them"
            raise FlagError(f"--layerwise and --store: expected both with several processes, got {got}; pass them")
        if count > self.rows:
            raise FlagError(f"--rows: expected at least one for each of {count} processes, got {self.rows}; raise it")
        if self.fsdp and count == 1:
            raise FlagError("--fsdp: expected several processes, got one; start it with torchrun")
        if self.fsdp and self.rows % count:
            # All of them go through the sharded layers equally often.
            raise FlagError(f"--rows: expected a multiple of {count} processes with --fsdp, got {self.rows}; change it")

    @property
    def recipe(self) -> Recipe:
        """What decides the outcome besides teacher and text."""
        names = {field.name for field in fields(Recipe)} - {"log_every"}
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Recipe(**given)
