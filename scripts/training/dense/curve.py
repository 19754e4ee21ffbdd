"""Held-out figures along stage 2: whether the student still comes closer, how sure it is, whether it still answers.

An instruct model that is taught on the wrong text keeps its loss and forgets to stop, so answers are asked for as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import LagunaForCausalLM

from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.signals import check_signals

BATCH = 16
REQUESTS, BUDGET = 32, 256

Conversation = list[dict[str, str]]


class Curve:
    """Figures every so many steps of a training, kept in a journal, so that one that goes on has them all.

    `measure`: a student → its held-out figures.
    """

    def __init__(self, path: Path, every: int, measure: Callable[[LagunaForCausalLM], dict[str, float]]) -> None:
        """Read what an earlier run has measured. Raises JournalError."""
        self._journal = Journal(path, dict[str, float])
        self._every, self._measure = every, measure

    @property
    def points(self) -> list[dict[str, float]]:
        """What was measured, with `step`: steps that the student had learned for."""
        return self._journal.entries

    def __call__(self, student: LagunaForCausalLM, step: int) -> None:
        """Measure in front of a step, where it is time and was not done."""
        if step % self._every or any(point["step"] == step for point in self.points):
            return
        training = student.training
        student.eval()
        self._journal.append({"step": float(step), **self._measure(student)})
        student.train(training)


def share_that_stops(
    model: LagunaForCausalLM, tokenizer: Any, conversations: Iterable[Conversation]
) -> dict[str, float]:
    """Ask the first requests of conversations: the share of greedy answers that end within the budget."""
    questions = [list(takewhile(lambda m: m["role"] != "assistant", messages)) for messages in conversations]
    ends = set(list_ends(model))
    answers = answer_greedily(model, tokenizer, questions, BUDGET)
    return {"stops": sum(bool(ends & set(answer)) for answer in answers) / len(answers)}


def answer_greedily(
    model: LagunaForCausalLM, tokenizer: Any, questions: Sequence[Conversation], budget: int
) -> list[list[int]]:
    """Answer conversations greedily; ids up to and with the first end, or the whole budget of new tokens."""
    answers = []
    for start in range(0, len(questions), BATCH):
        check_signals()
        answers += _generate(model, tokenizer, questions[start : start + BATCH], budget)
    return answers


@torch.no_grad()
def _generate(
    model: LagunaForCausalLM, tokenizer: Any, questions: Sequence[Conversation], budget: int
) -> list[list[int]]:
    rows = [
        tokenizer.apply_chat_template(q, add_generation_prompt=True, return_dict=True)["input_ids"] for q in questions
    ]
    width = max(map(len, rows))
    pad = model.config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made: Any = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=budget, do_sample=False
    )
    ends = list_ends(model)
    return [cut(row[width:].tolist(), ends) for row in made]


def cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Cut an answer behind its first end."""
    first = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: first + 1]


def list_ends(model: LagunaForCausalLM) -> list[int]:
    """List the tokens that end an answer."""
    ends: int | list[int] = model.config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
