"""What a request says of how its answer is to be drawn."""

from __future__ import annotations

from typing import TypedDict

from laguna_serve.serving.kit.results import JsonObject


class RequestFields(TypedDict, total=False):
    """Fields of a completion request beside its prompt and its model, as vLLM takes them."""

    max_tokens: int
    temperature: float
    seed: int
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: list[str]
    ignore_eos: bool
    logprobs: int
    chat_template_kwargs: JsonObject


# Sampling from the model's own distribution, beside a temperature: vLLM takes each field that a request leaves out from
# generation_config.json (`ModelConfig.get_diff_sampling_param`; XS.2's has `top_k: 20`).
PLAIN_SAMPLING: RequestFields = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
