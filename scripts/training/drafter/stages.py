"""The stages of training a drafter, each of which keeps what it has in the work folder and goes on from there.

answers/answers.jsonl         what the target said, as recorded traffic
states/learn, states/held-out hidden states (data/states.py)
training/                     before.json and training.state: drafter, optimiser, step and log
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch

from laguna_serve.plugins.formats.sequential_head import head_shapes
from laguna_serve.scripts.checkpoints.headers import read_headers
from laguna_serve.scripts.checkpoints.output import check_own
from laguna_serve.scripts.training.devices import require_device
from laguna_serve.scripts.training.drafter.answers import AnswerSource
from laguna_serve.scripts.training.drafter.blocks import Blocks, Shared
from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.drafter.data.records import Row, hash_rows
from laguna_serve.scripts.training.drafter.data.states import BATCH_TOKENS, SHARD_TOKENS, STORED, States, count_bytes
from laguna_serve.scripts.training.drafter.data.target import TargetLayers
from laguna_serve.scripts.training.drafter.data.whole import WholeTarget
from laguna_serve.scripts.training.drafter.held_out import measure_drafter
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
from laguna_serve.scripts.training.drafter.result import (
    DrafterTrainPlan,
    DrafterTrainResult,
    HeldOutTau,
    format_plan,
)
from laguna_serve.scripts.training.drafter.training import Fit, fit_drafter
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.scripts.training.pruning.streaming.sizes import measure_parts
from laguna_serve.serving.checkpoint import CheckpointError, Target, require_folder
from laguna_serve.serving.checkpoint.drafter import Drafter
from laguna_serve.serving.checkpoint.others import read_served
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.errors import first_line
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint, hold_folders, is_begun
from laguna_serve.serving.kit.signals import defer_signals

RESULT = "drafter_train.json"
# fp32 weights, their gradients, and AdamW's two moments.
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Run:
    """A command that was checked as far as it can be before anything is computed."""

    config: DrafterTrainConfig
    folder: Path
    target: Target
    other: bool  # the target is no Laguna
    warm: Drafter | None
    tokenizer: Any
    source: AnswerSource
    progress: Progress

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers that the drafter reads."""
        return list_taps(self.warm) if self.warm is not None else self._shape.target_layer_ids

    @cached_property
    def _shape(self) -> Any:
        return choose_shape(self.target, self.config.new, getattr(self.tokenizer, "mask_token_id", None))

    @cached_property
    def layers(self) -> TargetLayers | WholeTarget:
        """The target, of which the states are computed: a Laguna layer by layer, another whole."""
        dtype, device = getattr(torch, self.config.dtype), torch.device(self.config.device)
        if self.other:
            return WholeTarget(self.folder, self.target, dtype, device)
        return TargetLayers(self.folder, dtype, device)

    def plan(self) -> DrafterTrainPlan:
        """Add up what it takes."""
        config, answers, target = self.config, self.source.known, self.target
        asks = [*answers.asks_learned, *answers.asks_measured]
        recorded = [*answers.learned.rows, *answers.measured.rows]
        tokens = sum(len(row.tokens) for row in recorded)
        tokens += sum(min(len(ask.prompt) + config.max_tokens, config.max_length) for ask in asks)
        parameters = self._count_parameters()
        size, H = self.layers.dtype.itemsize, target.hidden_size
        kept = len({*self.taps, target.num_layers - 1})
        gamma = self._shape.gamma if self.warm is None else self.warm.max_gamma
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
            missing=self.source.count_missing(),
            states_bytes=count_bytes(tokens, H, kept, self.layers.dtype),
            states_memory_bytes=self._count_model_bytes(kept)
            + 4 * size * BATCH_TOKENS * (H + target.intermediate_size),
            training_memory_bytes=TRAINED_BYTES * parameters + 8 * target.vocab_size * H + 5 * logits + 3 * context,
        )

    def _count_model_bytes(self, kept: int) -> int:
        """Bytes of what is in memory of the target at once, and of a shard's states before they are written."""
        layers, shard = self.layers, self.target.hidden_size * SHARD_TOKENS
        if isinstance(layers, WholeTarget):
            return layers.memory_bytes + kept * STORED.itemsize * shard
        size = layers.dtype.itemsize
        return 3 * max(measure_parts(layers.weights, size).values()) + 2 * size * shard

    @property
    def _format(self) -> str:
        return self.config.format if self.warm is None else self.warm.format

    def _count_parameters(self) -> int:
        if self.warm is None:
            return count_parameters(self._shape, self.config.new)
        headers, _ = read_headers(Path(self.warm.name), self.warm.name)
        counted = sum(
            entry.numel for name, entry in headers.items() if name not in ("d2t", "t2d", "embed_tokens.weight")
        )
        rank = self.config.sequential_head
        if rank is None or self.warm.head_rank is not None:
            return counted
        return counted + sum(map(math.prod, head_shapes(self.target.vocab_size, self.warm.hidden_size, rank).values()))

    def train(self) -> DrafterTrainResult:
        """Every stage, or what is missing of it; writes drafter and result."""
        config = self.config
        check_out(config.out)
        check_out(config.work_folder)
        read = [self.folder, *([] if self.warm is None else [Path(self.warm.name)])]
        # Begun: the drafter may be there without its result, as where the disk became full between the two.
        own = (config.out / RESULT).exists() or is_begun(config.work_folder / "training")
        check_own(config.out, read, own=own)
        require_device(config.device)
        work = config.work_folder
        with hold_folders(config.out, work), count_minutes(work / MINUTES, lambda: _has_begun(work)) as minutes:
            return self._train(minutes)

    def _train(self, minutes: Callable[[], float]) -> DrafterTrainResult:
        config = self.config
        self.progress.say(format_plan(self.plan()))
        learned, measured = self.source.gather()
        torch.set_num_threads(config.threads)
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
            format=self._format,
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
            minutes=minutes(),
            log=log,
        )
        write_result(config.out / RESULT, result)
        return result

    def _compute(self, rows: list[Row], name: str) -> States:
        """Compute the hidden states of rows, where they are not on disk."""
        folder = self.config.work_folder / "states" / name
        settings = {"target": fingerprint(str(self.folder)), "taps": self.taps, "rows": hash_rows(rows)}
        claim_folder(folder, settings | {"dtype": self.config.dtype}, alone=True)
        states = States(folder, rows, self.taps, self.target.num_layers, self.target.hidden_size)
        if isinstance(self.layers, WholeTarget):
            states.compute_whole(self.layers, self.progress)
        else:
            states.compute(self.layers, self.progress)
        return states

    def _load_shared(self) -> Shared:
        if isinstance(self.layers, WholeTarget):
            return Shared(*self.layers.load_shared())
        layers = TargetLayers(self.folder, torch.float32, torch.device(self.config.device))
        return Shared(*layers.load_shared())

    def _make(self, rows: list[Row], shared: Shared) -> Made:
        if self.warm is not None:
            return load_warm(Path(self.warm.name), self.warm, self.config.sequential_head, self.config.seed)
        answers = torch.cat([row.tokens[row.start :].long() for row in rows])
        return make_drafter(self._shape, self.config.new, self.target, shared.head.weight, answers, self.config.seed)

    def _fit(self, made: Made) -> Fit:
        config, block = self.config, made.module.shape.block_size
        decay = config.decay or block / 2
        return Fit(
            config.loss, config.steps, config.lr, config.rows, config.anchors, decay, config.seed, config.threads
        )

    def _claim_training(self, rows: Any) -> Path:
        """Claim the folder of this training; return its state file."""
        config, folder = self.config, self.config.work_folder / "training"
        names = ("loss", "steps", "lr", "rows", "anchors", "decay", "seed", "dtype", "device", "threads")
        settings = {name: getattr(config, name) for name in names}
        settings |= {"target": fingerprint(str(self.folder)), "answers": hash_rows(rows)}
        warm = None if self.warm is None else fingerprint(self.warm.name)
        claim_folder(folder, settings | {"warm": warm, "new": asdict(config.new)}, alone=True)
        return folder / "training.state"

    def _measure_before(self, made: Made, held_out: Blocks) -> list[HeldOutTau]:
        """Measure the drafter as it is to begin with, once."""
        path = self.config.work_folder / "training" / "before.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=list[HeldOutTau])
        before = measure_drafter(made.module.eval(), held_out)
        write_stream(path, lambda file: file.write(msgspec.json.encode(before)))
        return before


def _has_begun(work: Path) -> bool:
    """Whether the work folder has a part that another run goes on with."""
    return any(is_begun(work / part) for part in ("answers", "states/learn", "training"))


def open_run(config: DrafterTrainConfig) -> Run:
    """Read and check target, drafter and tokenizer.

    Raises:
        CheckpointError: one of them cannot be used, or the drafter does not fit the target.
    """
    from transformers import AutoTokenizer

    folder = require_folder(config.target)
    served = read_served(folder)
    if (target := served.target) is None:
        expected = "a Laguna, or a model whose config.json says what it takes"
        raise CheckpointError(f"{folder}: expected {expected}, got {served.other}: {served.unplanned}")
    warm = (
        None
        if config.warm_start is None
        else read_warm(require_folder(config.warm_start), target, config.sequential_head)
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        if config.prompts is not None or (warm is None and config.mask_token is None):
            reason = first_line(error)
            raise CheckpointError(f"{folder}: expected the target's tokenizer, got: {reason}; fetch it") from None
        tokenizer = None
    progress = Progress()
    source = AnswerSource(config, folder, target, tokenizer, progress)
    return Run(config, folder, target, served.other is not None, warm, tokenizer, source, progress)
