"""Bodies of requests, and the fields that are refused since decoding by unmasking has no such thing.

A field of OpenAI's or vLLM's that is not served may still be sent with the value that changes nothing. A name that is
neither is refused too: one that is misspelt would otherwise be a setting that is silently not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from laguna_serve.plugins.diffusion.decoding.reference import MOST_SCALE
from laguna_serve.plugins.diffusion.server.errors import ApiError

# Without a meaning for what is answered.
ADVISORY = frozenset(
    (
        *("metadata", "parallel_tool_calls", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id"),
        *("safety_identifier", "service_tier", "store", "user", "verbosity"),
    )
)
# Field → the values that ask for nothing, beside null.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "detokenize": (True,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_p": (1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
MAX_CHOICES = 128
# As many as vLLM lists where nobody raises it.
MAX_LOGPROBS = 20


class TextPart(BaseModel):
    """A part of a message; others than texts are not read."""

    type: Literal["text", "input_text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat; its other fields are handed to the template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content, its parts put together."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream carries beside its pieces."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sent(BaseModel):
    """What a client sends: JSON whose texts can be written as UTF-8."""

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, value: object) -> object:
        r"""Refuse "\ud800": half of a pair is JSON, but no character, for no tokenizer and in no answer."""
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            message = "expected whole characters, got {half} alone; send both halves or none"
            raise PydanticCustomError("half", message, {"half": half}) from None
        return value


class Body(Sent):
    """What completions and chats have in common; the last fields are this engine's own.

    Attributes:
        steps: over the whole canvas, as the published loop counts them.
    """

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=MOST_SCALE, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    block_length: int | None = Field(None, ge=1)
    canvas_length: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    tokens_per_step: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, gt=0, lt=1)

    @property
    def listed(self) -> int | None:
        """How many of the likeliest tokens are listed beside each; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        """The stop strings, perhaps none."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            ApiError: a field is asked for that is not served, or is not known, or some do not go together.
        """
        for name, value in (self.model_extra or {}).items():
            if name in ADVISORY or value is None:
                continue
            if name not in NEUTRAL:
                raise ApiError(400, f"{name}: expected a field that is served here, got this one; drop it", name)
            if not any(_is_same(value, neutral) for neutral in NEUTRAL[name]):
                raise ApiError(400, f"{name}: expected none, as masked diffusion is decoded without; drop it", name)
        if "" in self.stops:
            raise ApiError(400, "stop: expected strings, got an empty one; drop it", "stop")
        if (self.n or 1) > 1 and not self.temperature:
            raise ApiError(400, f"n: expected 1 at temperature 0, got {self.n}; they would be equal", "n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: expected only with stream, got it without; drop it", "stream_options")
        schedules = [name for name in ("steps", "tokens_per_step", "threshold") if getattr(self, name) is not None]
        if len(schedules) > 1:
            raise ApiError(
                400, f"{schedules[1]}: expected one schedule, got {schedules[0]} too; drop one", schedules[1]
            )


class CompletionBody(Body):
    """Of /v1/completions; `prompt` is a text, ids, or several of them."""

    prompt: str | list[int] | list[str] | list[list[int]]
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, strict=True)

    @property
    def listed(self) -> int | None:
        return self.logprobs


class ChatBody(Body):
    """What /v1/chat/completions is asked."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, strict=True)

    @property
    def listed(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs beside it, got none; set it to true", "top_logprobs")


class TokenizeBody(Sent):
    """Of /tokenize: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Sent):
    """What /detokenize is asked."""

    model: str | None = None
    tokens: list[int]


def _is_same(value: object, neutral: object) -> bool:
    """Numbers are the same whatever their type, but no number is a truth value."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
