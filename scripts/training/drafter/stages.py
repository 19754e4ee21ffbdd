"""The stages of training a drafter, each of which keeps what it has in the work folder and goes on from there.

    answers/answers.jsonl         what the target said, as recorded traffic
    states/learn, states/held-out hidden states (data/states.py)
    training/                     before.json and training.state: drafter, optimiser, step and log
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch

from laguna_serve.scripts.checkpoints.headers import read_headers
from laguna_serve.scripts.training.drafter.blocks import Blocks, Shared
from laguna_serve.scripts.training.drafter.command import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.data.generation import (
    Ask,
    Asking,
    collect,
    find_missing,
    generate,
    list_asks,
    open_journal,
)
from laguna_serve.scripts.training.drafter.data.prompts import read_prompts
from laguna_serve.scripts.training.drafter.data.records import (
    Prompt,
    Row,
    Rows,
    choose_held_out,
    hash_rows,
    make_rows,
    split_rows,
)
from laguna_serve.scripts.training.drafter.data.states import BATCH_TOKENS, SHARD_TOKENS, States, count_bytes
from laguna_serve.scripts.training.drafter.data.target import TargetLayers
from laguna_serve.scripts.training.drafter.held_out import HeldOutTau, measure_drafter
from laguna_serve.scripts.training.drafter.models import (
    Made,
    choose_shape,
    count_parameters,
    list_taps,
    load_warm,
    make_drafter,
    read_warm,
    write_drafter,
)
from laguna_serve.scripts.training.drafter.result import DrafterTrainPlan, DrafterTrainResult, format_plan
from laguna_serve.scripts.training.drafter.training import Fit, fit_drafter
from laguna_serve.scripts.training.pruning.streaming.sizes import measure_parts
from laguna_serve.serving.checkpoint import CheckpointError, Target, read_target, require_folder
from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.client.traffic import TrafficRecord, read_traffic
from laguna_serve.serving.engine import Engine, EngineConfig
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint
from laguna_serve.serving.kit.signals import defer_signals

RESULT = "drafter_train.json"
# An answer shorter than this teaches next to nothing: prompts that leave less room are not asked.
LEAST_ROOM = 16
# fp32 weights, their gradients, and AdamW's two moments.
TRAINED_BYTES = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What is learned from and measured on, recorded; and what the target is still to be asked, on either side."""

    learned: Rows
    measured: Rows
    asks_learned: list[Ask] = field(default_factory=list)
    asks_measured: list[Ask] = field(default_factory=list)
    prompts: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class Run:
    """A command that was checked as far as it can be before anything is computed."""

    config: DrafterTrainConfig
    folder: Path
    target: Target
    warm: Drafter | None
    tokenizer: Any
    progress: Progress

    @cached_property
    def answers(self) -> Answers:
        """Read prompts or recorded traffic, and split them."""
        config = self.config
        if config.prompts is not None:
            most = config.max_length - LEAST_ROOM
            prompts = read_prompts(config.prompts, self.tokenizer, self.target.vocab_size)
            fitting = [prompt for prompt in prompts if len(prompt) <= most]
            held = choose_held_out(fitting, config.held_out)
            learned = [prompt for prompt in fitting if prompt not in held]
            return Answers(
                learned=Rows([], len(prompts) - len(fitting)),
                measured=Rows([], 0),
                asks_learned=list_asks(learned, config.temperature, config.samples, config.seed),
                asks_measured=self._ask_held_out(held),
                prompts=len(fitting),
                held_out=len(held),
            )
        recorded = self._make_rows(chain.from_iterable(map(read_traffic, config.tokens)), ", ".join(map(str, config.tokens)))
        different = {row.prompt for row in recorded.rows}
        held = choose_held_out(different, config.held_out)
        learned_rows, measured = split_rows(recorded.rows, held)
        return Answers(
            learned=Rows(learned_rows, recorded.skipped),
            measured=Rows(measured if config.recorded_only else [], 0),
            asks_measured=[] if config.recorded_only else self._ask_held_out(held),
            prompts=len(different),
            held_out=len(held),
        )

    def _ask_held_out(self, held: set[Prompt]) -> list[Ask]:
        return list_asks(sorted(held), self.config.measure, 1, self.config.seed + 1)

    def _make_rows(self, records: Any, source: str) -> Rows:
        vocabulary, most = self.target.vocab_size, self.config.max_length
        return make_rows(records, source=source, vocabulary=vocabulary, max_length=most)

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers that the drafter reads."""
        return list_taps(self.warm) if self.warm is not None else self._shape.target_layer_ids

    @cached_property
    def _shape(self) -> Any:
        return choose_shape(self.target, self.config.new, getattr(self.tokenizer, "mask_token_id", None))

    @cached_property
    def layers(self) -> TargetLayers:
        """The target, of which the states are computed."""
        return TargetLayers(self.folder, getattr(torch, self.config.dtype), torch.device(self.config.device))

    def plan(self) -> DrafterTrainPlan:
        """Add up what it takes."""
        config, answers, target = self.config, self.answers, self.target
        asks = [*answers.asks_learned, *answers.asks_measured]
        recorded = [*answers.learned.rows, *answers.measured.rows]
        tokens = sum(len(row.tokens) for row in recorded)
        tokens += sum(min(len(ask.prompt) + config.max_tokens, config.max_length) for ask in asks)
        parameters = self._count_parameters()
        size, H = self.layers.dtype.itemsize, target.hidden_size
        part = max(measure_parts(self.layers.weights, size).values())
        gamma = (self._shape.gamma if self.warm is None else self.warm.max_gamma)
        logits = config.rows * config.anchors * gamma * target.vocab_size * 4
        context = config.rows * config.max_length * len(self.taps) * H * 4
        return DrafterTrainPlan(
            target=config.target,
            warm_start=config.warm_start,
            format=self._format,
            taps=self.taps,
            parameters=parameters,
            prompts=answers.prompts,
            held_out_prompts=answers.held_out,
            answers=len(recorded) + len(asks),
            tokens=tokens,
            generated=len(asks),
            missing=len(find_missing(asks, self._peek_journal())),
            states_bytes=count_bytes(tokens, H, len({*self.taps, target.num_layers - 1}), self.layers.dtype),
            states_memory_bytes=3 * part + 2 * size * H * SHARD_TOKENS + 4 * size * BATCH_TOKENS * (H + target.intermediate_size),
            training_memory_bytes=TRAINED_BYTES * parameters + 8 * target.vocab_size * H + 5 * logits + 3 * context,
        )

    @property
    def _format(self) -> str:
        return self.config.format if self.warm is None else self.warm.format

    def _count_parameters(self) -> int:
        if self.warm is None:
            return count_parameters(self._shape, self.config.new)
        headers, _ = read_headers(Path(self.warm.name), self.warm.name)
        return sum(entry.numel for name, entry in headers.items() if name not in ("d2t", "t2d", "embed_tokens.weight"))

    @property
    def _journal_path(self) -> Path:
        return self.config.work_folder / "answers" / "answers.jsonl"

    def _peek_journal(self) -> Journal[TrafficRecord]:
        """Open the journal as it is; where there is none yet, an empty one that is nowhere."""
        return open_journal(self._journal_path, self.progress)

    def train(self) -> DrafterTrainResult:
        """Every stage, or what is missing of it; writes drafter and result."""
        started, config = time.monotonic(), self.config
        check_out(config.out)
        check_out(config.work_folder)
        self._check_device()
        self.progress.say(format_plan(self.plan()))
        learned, measured = self._gather()
        torch.use_deterministic_algorithms(True, warn_only=config.device == "cuda")
        with defer_signals():
            shared = self._load_shared()
            blocks = [
                Blocks(rows.rows, self._compute(rows.rows, name), shared)
                for rows, name in ((learned, "learn"), (measured, "held-out"))
            ]
            made = self._make(learned.rows, shared)
            made.module.to(shared.device)
            state_file = self._claim_training(blocks[0].rows)
            before = self._measure_before(made, blocks[1])
            log = fit_drafter(made.module, blocks[0], self._fit(made), state_file)
            after = measure_drafter(made.module.eval(), blocks[1])
            write_drafter(made, self.folder, config.out)
        result = DrafterTrainResult(
            environment=read_environment(current_argv()),
            target=config.target,
            warm_start=config.warm_start,
            out=str(config.out),
            format=self._format,  # type: ignore[arg-type]
            loss=config.loss,
            steps=config.steps,
            seed=config.seed,
            parameters=made.parameters,
            temperatures=tuple(sorted({row.temperature for row in learned.rows})),
            answers=len(learned.rows),
            tokens=learned.tokens,
            skipped=learned.skipped,
            before=before,
            after=after,
            minutes=round((time.monotonic() - started) / 60, 2),
            log=log,
        )
        write_result(config.out / RESULT, result)
        return result

    def _check_device(self) -> None:
        if self.config.device == "cuda" and not torch.cuda.is_available():
            raise CheckpointError("--device cuda: expected a GPU that torch sees, got none; leave it out")

    def _gather(self) -> tuple[Rows, Rows]:
        """The recorded answers and those that the target was asked for."""
        answers, config = self.answers, self.config
        asks = [*answers.asks_learned, *answers.asks_measured]
        if not asks:
            return self._check_rows(answers.learned, answers.measured)
        how = {"target": fingerprint(str(self.folder)), "max_tokens": config.max_tokens, "eos": config.ignore_eos}
        claim_folder(self._journal_path.parent, how)
        journal = open_journal(self._journal_path, self.progress)
        missing = find_missing(asks, journal)
        if missing:
            asking = Asking(config.max_tokens, config.ignore_eos, config.concurrency)
            with ExitStack() as stack:
                url, model = config.endpoint, config.model
                if url is None:
                    longest = max(len(ask.prompt) for ask in missing) + config.max_tokens
                    engine = stack.enter_context(self._start_engine(longest))
                    url, model = engine.base_url, engine.model_name
                generate(asks, asking, journal, url, model, self.progress)
        source = str(self._journal_path)
        learned = self._make_rows(collect(answers.asks_learned, journal), source)
        measured = self._make_rows(collect(answers.asks_measured, journal), source)
        skipped = answers.learned.skipped + learned.skipped
        rows = Rows([*answers.learned.rows, *learned.rows], skipped)
        return self._check_rows(rows, Rows([*answers.measured.rows, *measured.rows], measured.skipped))

    def _check_rows(self, learned: Rows, measured: Rows) -> tuple[Rows, Rows]:
        for rows, what in ((learned, "learn from"), (measured, "measure on")):
            if not rows.rows:
                got = f"none of two tokens or more ({rows.skipped} shorter, or with prompts of {self.config.max_length})"
                raise CheckpointError(f"answers: expected some to {what}, got {got}; pass more, or raise --max-length")
        return learned, measured

    def _start_engine(self, longest: int) -> Engine:
        config = self.config
        engine = EngineConfig(
            model=str(self.folder),
            max_num_seqs=config.concurrency,
            max_model_len=min(longest, self.target.max_model_len),
            enforce_eager=config.eager,
            served_model_name="target",
        )
        log = self._journal_path.parent / "engine.log"
        return Engine(engine, log_path=log, announce=self.progress.say)

    def _compute(self, rows: list[Row], name: str) -> States:
        """Hidden states of rows, those on disk or now computed."""
        folder = self.config.work_folder / "states" / name
        settings = {"target": fingerprint(str(self.folder)), "taps": self.taps, "rows": hash_rows(rows)}
        claim_folder(folder, settings | {"dtype": self.config.dtype})
        states = States(folder, rows, self.taps, self.target.num_layers, self.target.hidden_size)
        states.compute(self.layers, self.progress)
        return states

    def _load_shared(self) -> Shared:
        layers = TargetLayers(self.folder, torch.float32, torch.device(self.config.device))
        return Shared(*layers.load_shared())

    def _make(self, rows: list[Row], shared: Shared) -> Made:
        if self.warm is not None:
            return load_warm(Path(self.warm.name), self.warm)
        answers = torch.cat([row.tokens[row.start :].long() for row in rows])
        return make_drafter(self._shape, self.config.new, self.target, shared.head.weight, answers, self.config.seed)

    def _fit(self, made: Made) -> Fit:
        config, block = self.config, made.module.shape.block_size
        decay = config.decay or block / 2
        return Fit(config.loss, config.steps, config.lr, config.rows, config.anchors, decay, config.seed)

    def _claim_training(self, rows: Any) -> Path:
        """The state file, in a folder that is this training's alone."""
        config, folder = self.config, self.config.work_folder / "training"
        names = ("loss", "steps", "lr", "rows", "anchors", "decay", "seed", "dtype", "device")
        settings = {name: getattr(config, name) for name in names}
        settings |= {"target": fingerprint(str(self.folder)), "answers": hash_rows(rows)}
        warm = None if self.warm is None else fingerprint(self.warm.name)
        claim_folder(folder, settings | {"warm": warm, "new": asdict(config.new)})
        return folder / "training.state"

    def _measure_before(self, made: Made, held_out: Blocks) -> list[HeldOutTau]:
        """Measure the drafter as it is to begin with, once."""
        path = self.config.work_folder / "training" / "before.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=list[HeldOutTau])
        before = measure_drafter(made.module.eval(), held_out)
        write_stream(path, lambda file: file.write(msgspec.json.encode(before)))
        return before


def open_run(config: DrafterTrainConfig) -> Run:
    """Read and check target, drafter and tokenizer.

    Raises:
        CheckpointError: one of them cannot be used, or the drafter does not fit the target.
    """
    from transformers import AutoTokenizer

    folder = require_folder(config.target)
    target = read_target(folder)
    warm = None if config.warm_start is None else read_warm(require_folder(config.warm_start), target)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        if config.prompts is not None or (warm is None and config.mask_token is None):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: expected the target's tokenizer, got: {reason}; fetch it") from None
        tokenizer = None
    return Run(config, folder, target, warm, tokenizer, Progress())


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"drafter: {text}", file=sys.stderr, flush=True)
