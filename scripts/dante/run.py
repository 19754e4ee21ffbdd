"""One training run: student, trainer and state. Imported in an environment with TRL alone."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from laguna_serve.scripts.checkpoints.output import save_checkpoint
from laguna_serve.scripts.dante.options import DanteConfig, DanteStep
from laguna_serve.scripts.training.dante.anchor import check_sharing
from laguna_serve.scripts.training.dante.loading import load_student
from laguna_serve.scripts.training.dante.records import CacheError
from laguna_serve.scripts.training.dante.rows import TaughtRows
from laguna_serve.scripts.training.dante.states import find_state
from laguna_serve.scripts.training.dante.trainer import NOT_FINITE, Objective, make_trainer
from laguna_serve.serving.kit.errors import CommandError

CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


class Run:
    """A student in training."""

    def __init__(self, config: DanteConfig, work: Path) -> None:
        """Load the student in float32. Raises CommandError: there is none, or the settings do not go together."""
        torch.set_num_threads(config.threads)
        self._config, self._work = config, work
        self._state = PartialState(cpu=config.device == "cpu")
        self.processes = int(self._state.num_processes)
        self.is_main = bool(self._state.is_main_process)
        self.rows = 0
        self.drift = 0.0
        self.log: list[DanteStep] = []
        if config.batch % self.processes:
            remedy = "change --batch or --num_processes"
            raise CommandError(
                f"--batch: expected a multiple of {self.processes} processes, got {config.batch}; {remedy}"
            )
        part = config.batch // self.processes
        self._micro = min(config.micro_batch or part, part)
        if part % self._micro:
            expected = f"a divisor of a process's {part} rows"
            raise CommandError(f"--micro-batch: expected {expected}, got {self._micro}; choose one")
        self._model = load_student(config.model)
        self._weights: dict[str, torch.Tensor] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """Load the student's own tokenizer."""
        return AutoTokenizer.from_pretrained(self._config.model)

    def count_rows(self, taught: TaughtRows) -> None:
        """Take the rows of whole steps alone, so that every process has as much in every one of them.

        Raises:
            CacheError: fewer rows than a step takes.
        """
        batch = self._config.batch
        self.rows = len(taught.rows) // batch * batch
        if not self.rows:
            raise CacheError(f"--batch: expected at most the {len(taught.rows)} rows there are, got {batch}; lower it")

    def train(self, taught: TaughtRows) -> None:
        """Train to the end, from the last saved state where there is one, on the rows that were counted.

        Raises:
            CommandError: processes share the student out in another way, or the loss is no longer finite.
            KeyboardInterrupt: a signal came; the state is saved.
        """
        config = self._config
        objective = Objective(
            weigh=config.weighs,
            anchor=config.anchored,
            ramp=not config.plain,
            center=config.entropy_center,
            warm_up=config.warm_up_steps,
        )
        trainer, stopping = make_trainer(
            self._model, self.tokenizer, taught.rows[: self.rows], objective, self._list_settings()
        )
        accelerator = trainer.accelerator
        check_sharing(accelerator.distributed_type.value, is_fsdp2=accelerator.is_fsdp2)
        trainer.train(resume_from_checkpoint=find_state(self._work))
        if stopping.stopped and trainer.state.global_step < config.steps:
            raise KeyboardInterrupt
        self.drift = trainer.measure_drift()
        if not math.isfinite(self.drift):  # the last step's gradients have made it so
            raise CommandError(f"training: expected finite weights, got an embedding that is not; {NOT_FINITE}")
        self._weights = accelerator.get_state_dict(trainer.model)  # of parts too, for the main process
        self.log = [_read_step(entry) for entry in trainer.state.log_history if "loss" in entry]

    def save(self) -> None:
        """Write the student as it has become, in its initialisation's dtype, with its tokenizer.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        student = load_student(self._config.model, "auto")
        student.load_state_dict(self._weights)

        def save(folder: Path) -> None:
            student.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        save_checkpoint(self._config.out, save)

    def wait(self) -> None:
        """Wait until every process is here."""
        self._state.wait_for_everyone()

    def _list_settings(self) -> dict[str, Any]:
        config = self._config
        return {
            "output_dir": str(self._work),
            "max_steps": config.steps,
            "per_device_train_batch_size": self._micro,
            "gradient_accumulation_steps": config.batch // self.processes // self._micro,
            "learning_rate": config.lr,
            "lr_scheduler_type": "cosine",
            "warmup_steps": config.warm_up_steps,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": CLIP,
            "train_sampling_strategy": "random" if config.curriculum == "none" else "sequential",
            "bf16": config.precision == "bfloat16",
            "gradient_checkpointing": config.checkpointing,
            "use_cpu": config.device == "cpu",
            "seed": config.seed,
            "data_seed": config.seed,
            "save_steps": config.save_every,
            "save_total_limit": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
        }


def _read_step(entry: dict[str, Any]) -> DanteStep:
    return DanteStep(
        step=int(entry["step"]),
        loss=float(entry["loss"]),
        cross_entropy=float(entry["cross_entropy"]),
        weight=float(entry["weight"]),
        drift=float(entry["drift"]),
        grad_norm=float(entry["grad_norm"]),
        lr=float(entry["learning_rate"]),
    )
