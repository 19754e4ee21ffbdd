"""What the toy's drafters are made with, by the command that makes any drafter: `laguna drafter train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from laguna_serve.scripts.training.drafter.config import DrafterTrainConfig
from laguna_serve.scripts.training.toy import tokenizer as vocabulary

STEPS, LR = 4400, 3e-3
HELD_OUT = 64


def describe_laguna(teacher: Path, answers: Path, out: Path, work: Path, steps: int, seed: int) -> DrafterTrainConfig:
    """Describe two layers of the teacher's width, tapping it after four of its six layers: 0.88 M parameters."""
    return DrafterTrainConfig(
        target=str(teacher),
        tokens=(answers,),
        recorded_only=True,
        held_out=HELD_OUT,
        out=out,
        work=work,
        layers=2,
        taps=(1, 3, 4, 5),
        width=640,
        heads=6,
        mask_token=vocabulary.MASK,
        steps=steps,
        lr=LR,
        seed=seed,
    )


def describe_speculators(
    teacher: Path, answers: Path, out: Path, work: Path, steps: int, seed: int
) -> DrafterTrainConfig:
    """Describe a smaller one in the speculators format: one layer, three taps, half of the vocabulary."""
    return replace(
        describe_laguna(teacher, answers, out, work, steps, seed),
        format="speculators",
        layers=1,
        taps=(1, 3, 5),
        width=320,
        heads=4,
        draft_vocab=256,
    )
