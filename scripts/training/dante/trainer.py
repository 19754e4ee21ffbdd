"""DANTE's loss in TRL's SFTTrainer, which has the loop, devices, checkpoints and their resuming.

Imported where training happens alone: TRL is in .venv-train (scripts/client_env.sh train). Rows come tokenised, as TRL
would end every answer with the end token, those too that were cut off.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from laguna_serve.scripts.training.dante.anchor import EmbeddingAnchor
from laguna_serve.scripts.training.dante.losses import (
    Anchor,
    confidence_weight,
    schedule_ce,
    schedule_tea,
    sequence_cross_entropy,
    weighted_cross_entropy,
)
from laguna_serve.scripts.training.dante.rows import TaughtRow
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.signals import check_signals

# What to do then.
NOT_FINITE = "lower --lr, and check that the weights of the model are finite"


@dataclass(frozen=True, slots=True)
class Objective:
    """Which of the parts are on. Plain fine-tuning has none of them.

    Attributes:
        weigh: by the teacher's entropy (CWCE).
        anchor: the embedding (TEA).
        ramp: λ_CE rises; else it is 1.
        center: where the weight is half-way, in nats.
        warm_up: of λ_CE, in steps.
    """

    weigh: bool
    anchor: Anchor
    ramp: bool
    center: float
    warm_up: int


class WeighedCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Pads a batch, and carries each row's entropy along."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels [B, T] and entropy [B]."""
        batch: dict[str, Any] = super().torch_call(examples)
        return {**batch, "entropy": torch.tensor([example["entropy"] for example in examples], dtype=torch.float32)}


class DanteTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with DANTE's loss. TEA anchors to the embedding that it is made with, resumed or not."""

    def __init__(self, *, objective: Objective, **options: Any) -> None:
        super().__init__(**options)
        self.objective = objective
        self.loss_is_scaled_for_ga = False  # a mean per batch
        self._seen: dict[str, list[float]] = defaultdict(list)
        self._anchor = EmbeddingAnchor(self._embedding, objective.anchor)

    def measure_drift(self) -> float:
        """Return how far the embedding has moved, over its initial norm; in all processes together."""
        return float(self._anchor.measure(self._embedding))

    @property
    def _embedding(self) -> torch.nn.Parameter:
        weight: torch.nn.Parameter = self.accelerator.unwrap_model(self.model).get_input_embeddings().weight
        return weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted cross entropy of a batch under its schedule, a scalar.

        Raises:
            CommandError: it is not finite, in any of the processes; no step comes back from that.
        """
        entropy, labels = inputs["entropy"], inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        losses = sequence_cross_entropy(outputs.logits, labels)
        what, step, steps = self.objective, self.state.global_step, self.state.max_steps
        weights = confidence_weight(entropy, what.center) if what.weigh else torch.ones_like(losses)
        ce_factor = schedule_ce(step, steps, what.warm_up) if what.ramp else 1.0
        loss = ce_factor * weighted_cross_entropy(losses, weights)
        self._note(cross_entropy=losses.detach().mean(), weight=weights.mean())
        if not math.isfinite(self._seen["cross_entropy"][-1]):
            got = f"{self._seen['cross_entropy'][-1]} in step {step + 1} of {steps}"
            raise CommandError(f"training: expected a finite loss, got {got}; {NOT_FINITE}")
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take a batch's gradients, with the last of a step TEA's: return its share of the total loss, detached."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        self._note(drift=self._anchor.measure(self._embedding))
        return loss + self._anchor.pull(self._embedding, schedule_tea(self.state.global_step, self.state.max_steps))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts' means since the last time."""
        logs.update({name: sum(values) / len(values) for name, values in self._seen.items() if values})
        self._seen.clear()
        super().log(logs, start_time)

    def _note(self, **figures: torch.Tensor) -> None:
        for name, value in figures.items():
            self._seen[name].append(float(self.accelerator.reduce(value.float(), "mean")))

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait for every process's, as trainer_state.json, written next, says that all is there (states.py)."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leave TRL's card out: what there is to say is in the result."""


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Saves and ends the training after the step in which a signal came, in all processes together; shows progress."""

    def __init__(self) -> None:
        self.trainer: DanteTrainer | None = None
        self.stopped = False
        self._progress = Progress()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask all processes whether one of them is to stop."""
        assert self.trainer is not None
        accelerator = self.trainer.accelerator
        try:
            check_signals()
        except KeyboardInterrupt:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            control.should_save = control.should_training_stop = self.stopped = True
        if state.is_world_process_zero:
            self._progress.step("taught", state.global_step, state.max_steps)
        return control


def make_dataset(rows: list[TaughtRow]) -> Dataset:
    """Make a data set of rows, in their order."""
    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [list(row.labels) for row in rows],
            "entropy": [row.entropy for row in rows],
        }
    )


def make_trainer(
    model: Any, tokenizer: Any, rows: list[TaughtRow], objective: Objective, settings: dict[str, Any]
) -> tuple[DanteTrainer, Stopping]:
    """Make the trainer; `settings`: SFTConfig's own, besides what follows from rows that are tokenised."""
    arguments = SFTConfig(
        **settings,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
        max_length=None,
    )
    stopping = Stopping()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = DanteTrainer(
        objective=objective,
        model=model,
        args=arguments,
        train_dataset=make_dataset(rows),
        processing_class=tokenizer,
        data_collator=WeighedCollator(pad_token_id=pad),
        callbacks=[stopping],
    )
    stopping.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # a line a step
    return trainer, stopping
