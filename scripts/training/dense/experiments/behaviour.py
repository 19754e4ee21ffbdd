"""Does a model still answer? Greedy answers to held-out requests, and what can be checked of them without a judge.

The toy's requests are "complete this function" with its head; the answer is the whole function, then <|end|>.
"""

from __future__ import annotations

import ast
from itertools import islice
from typing import Any

import msgspec
from transformers import LagunaForCausalLM

from laguna_serve.scripts.training.dense.curve import answer_greedily, list_ends
from laguna_serve.scripts.training.dense.text import stream_conversations


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
    answers = answer_greedily(model, tokenizer, questions, budget)
    ends = set(list_ends(model))
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
