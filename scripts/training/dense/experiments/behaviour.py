"""Does a model still answer?  Greedy answers to held-out requests, and what can be checked of them without a judge.

The toy's requests are "complete this function" with its head; the answer is the whole function, then <|end|>.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec
import torch
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.text import stream_conversations
from laguna_serve.serving.kit.signals import check_signals

BATCH = 16


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the answers.

    Attributes:
        requests: that were answered.
        stops: ended by an end-of-sequence token within the budget.
        restates: begin with the request's first line of code, as every answer that was learned from does.
        parses: end, and are Python.
        tokens: of an answer, on average; one that does not end has the whole budget.
    """

    requests: int
    stops: float
    restates: float
    parses: float
    tokens: float


def ask(model: LagunaForCausalLM, tokenizer: Any, source: str, requests: int, budget: int) -> Behaviour:
    """Put the first requests of a source to a model, `budget` new tokens each."""
    conversations = list(islice(stream_conversations(source), requests))
    questions = [[m for m in messages if m["role"] != "assistant"] for messages in conversations]
    answers: list[list[int]] = []
    for start in range(0, len(questions), BATCH):
        check_signals()
        answers += _generate(model, tokenizer, questions[start : start + BATCH], budget)
    ends = set(_ends(model))
    stopped = [bool(ends & set(answer)) for answer in answers]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    heads = [question[-1]["content"].partition("\n")[2].splitlines()[0] for question in questions]
    pairs = list(zip(texts, heads, strict=True))
    count = len(answers)
    return Behaviour(
        requests=count,
        stops=sum(stopped) / count,
        restates=sum(text.startswith(head) for text, head in pairs) / count,
        parses=sum(stop and is_python(text) for stop, text in zip(stopped, texts, strict=True)) / count,
        tokens=sum(map(len, answers)) / count,
    )


def is_python(text: str) -> bool:
    """Say whether a text is a Python program, and not an empty one."""
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


@torch.no_grad()
def _generate(
    model: LagunaForCausalLM, tokenizer: Any, questions: Sequence[list[dict[str, str]]], budget: int
) -> list[list[int]]:
    """Answer greedily; ids up to and with the first end, or the whole budget."""
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
    ends = _ends(model)
    return [cut(row[width:].tolist(), ends) for row in made]


def cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Cut an answer behind its first end."""
    first = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: first + 1]


def _ends(model: LagunaForCausalLM) -> list[int]:
    ends: int | list[int] = model.config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
