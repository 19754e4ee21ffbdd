"""The objects of answers, as OpenAI's clients and vLLM's users know them; what is not set is not sent."""

from __future__ import annotations

from pydantic import BaseModel


class Usage(BaseModel):
    """Tokens of prompts and answers, ends included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Said(BaseModel):
    """A chat's message, or what is new of it."""

    role: str = "assistant"
    content: str


class CompletionLogprobs(BaseModel):
    """Of a completion's tokens, in nats; beside each the likeliest. Offsets: of their texts, in characters."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TokenLogprob(BaseModel):
    """A token, its UTF-8 bytes and its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob] | None = None


class ChatLogprobs(BaseModel):
    """What a chat's tokens have."""

    content: list[TokenLogprob]


class ChoiceForm(BaseModel):
    """One choice, or what is new of it: a `text`, a `message` or a `delta`."""

    index: int
    text: str | None = None
    message: Said | None = None
    delta: Said | None = None
    logprobs: CompletionLogprobs | ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class AnswerForm(BaseModel):
    """An answer, or one event of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceForm]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ErrorForm(BaseModel):
    """What is wrong with a request; `code` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The answer to a request that is not served."""

    error: ErrorForm


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "laguna-serve"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[str] = []


class ModelList(BaseModel):
    """All models, which is one."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeAnswer(BaseModel):
    """The ids of a text or chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    """The text of ids."""

    prompt: str
