"""Answers with the log-probabilities of the passes that chose their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from laguna_serve.serving.kit.results import JsonObject

# How far above zero rounding may bring a log-probability.
ABOVE_ZERO = 1e-3
LOGITS = "serve with --logprobs-mode raw_logprobs (vLLM's default), as logits are none"


@dataclass(frozen=True, slots=True)
class Probe:
    """One greedy answer with log-probabilities.

    Attributes:
        top: of each step, token id → log-probability (nats) of the best two tokens and of the chosen one.
        prompt_ids: the prompt as the engine read it.
    """

    token_ids: tuple[int, ...]
    top: tuple[dict[int, float], ...]
    text: str = ""
    prompt_ids: tuple[int, ...] = ()


def read_logprob(value: object) -> float:
    """Read a log-probability.

    Raises:
        TypeError, ValueError: it is none, as NaN, which would compare as no difference, or a logit.
    """
    if not isinstance(value, int | float):
        raise TypeError(f"a log-probability that is {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"a log-probability that is {value}; is the model sound?")
    if value > ABOVE_ZERO:
        raise ValueError(f"a log-probability of {value:g}; {LOGITS}")
    return float(value)


def decode_probe(answer: JsonObject) -> Probe:
    """Read a completion answered with `return_token_ids`, `logprobs` and `return_tokens_as_token_ids` ("token_id:7").

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of another kind, or a log-probability is not finite.
    """
    choice = answer["choices"][0]
    top = tuple(
        {int(name.removeprefix("token_id:")): read_logprob(value) for name, value in step.items()}
        for step in choice["logprobs"]["top_logprobs"]
    )
    prompt_ids = tuple(choice.get("prompt_token_ids") or ())
    return Probe(tuple(choice["token_ids"]), top, text=choice.get("text") or "", prompt_ids=prompt_ids)
