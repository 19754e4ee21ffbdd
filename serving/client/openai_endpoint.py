"""Asks one OpenAI-compatible endpoint for answers, one request per sample, on the official client.

The client retries what is worth it (429, 5xx, lost connections) with backoff. What still fails raises, so that a caller
can record a failure and ask again later: an answer that never came is not a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal

import openai

from laguna_serve.serving.client.completions import find_root
from laguna_serve.serving.client.errors import EndpointError, RefusedError, find_broken_end
from laguna_serve.serving.client.sampling import RequestFields
from laguna_serve.serving.kit.results import JsonObject

Form = Literal["chat", "completion"]
# Which weights answered, named by servers whose weights change while they serve.
VERSION_HEADERS = ("X-Weight-Version", "X-Draft-Version")
# From the endpoint's queue to the last token: an answer with long thoughts comes whole, and nothing of it before.
TIMEOUT_S, CONNECT_S = 3600.0, 30.0
# Of an answer; a number beyond it is none, and none that a journal could hold.
MOST_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        finish_reason: "stop", "length" (cut off at max_tokens), ….
        tokens: of the answer; None where the endpoint does not say.
        versions: those of VERSION_HEADERS that the response carries.
        top: of each token, log-probabilities (nats) of the likeliest ones, where they were asked for and are given.
    """

    text: str
    finish_reason: str | None = None
    tokens: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    top: tuple[tuple[float, ...], ...] | None = None


class Endpoint:
    """One model behind one endpoint, as an async context manager. `base_url` may end in /v1 or not.

    Args:
        model: name to send, None for the first that the endpoint lists (`model` has it after entering).
        api_key: None where the endpoint wants none.
        retries: requests that the client repeats by itself.
    """

    def __init__(
        self, base_url: str, *, model: str | None = None, api_key: str | None = None, retries: int = 2
    ) -> None:
        self.base_url = find_root(base_url) + "/v1"
        self.model = model or ""
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=api_key or "none",
            max_retries=retries,
            timeout=openai.Timeout(TIMEOUT_S, connect=CONNECT_S),
        )

    async def __aenter__(self) -> Endpoint:
        """Find the model's name.

        Raises:
            EndpointError: the endpoint does not answer, or lists no model.
        """
        try:
            if not self.model:
                self.model = await self._find_model()
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(
        self, prompt: str | Sequence[JsonObject], form: Form, sampling: RequestFields, top: int | None = None
    ) -> Answer:
        """One answer: to a user's message, or to a conversation's messages, or a raw completion.

        Args:
            sampling: the request's other fields; those that are not the OpenAI API's own go as they are.
            top: so many log-probabilities of each token; a completion's are by text: tokens of one text are one.

        Raises:
            EndpointError: there is none, or one that the server broke off.
        """
        said: Any = None  # the response
        try:
            if form == "chat":
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
                wanted = {} if top is None else {"logprobs": True, "top_logprobs": top}
                chat = await self._client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]  # as they were given
                    extra_body={**sampling, **wanted},
                )
                said = chat.http_response
                body = chat.parse()
                text, reason = _read_text(body.choices[0].message.content or ""), body.choices[0].finish_reason
                tokens = body.usage.completion_tokens if body.usage else None
                known = body.choices[0].logprobs
                likeliest = [
                    [float(one.logprob) for one in step.top_logprobs] for step in (known and known.content) or ()
                ]
            else:
                extra = {} if top is None else {"logprobs": top}
                raw = await self._client.completions.with_raw_response.create(
                    model=self.model, prompt=str(prompt), extra_body={**sampling, **extra}
                )
                said = raw.http_response
                completion = raw.parse()
                text, reason = _read_text(completion.choices[0].text), completion.choices[0].finish_reason
                tokens = completion.usage.completion_tokens if completion.usage else None
                given = completion.choices[0].logprobs
                likeliest = [list(map(float, (step or {}).values())) for step in (given and given.top_logprobs) or ()]
        except openai.OpenAIError as error:
            refused = isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
            kind = RefusedError if refused else EndpointError
            raise kind(f"{self.base_url}: {_describe(error)}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            got = f"{type(error).__name__} of {_shorten(said.text) if said else 'nothing'}"
            raise EndpointError(f"{self.base_url}: expected an OpenAI answer, got {got}") from error
        if (broken := find_broken_end(reason)) is not None:
            raise EndpointError(f"{self.base_url}: {broken}")
        versions = {name: said.headers[name] for name in VERSION_HEADERS if name in said.headers}
        ended = reason if isinstance(reason, str) else None  # the client reads any JSON, whatever its types say
        return Answer(text, ended, _read_count(tokens), versions, tuple(map(tuple, likeliest)) or None)

    async def find_checkpoint(self) -> str | None:
        """Find where the endpoint says that the model was loaded from; None where it says nothing of its models.

        Raises:
            EndpointError: it does not answer.
        """
        try:
            cards = (await self._client.models.list()).data
            roots = {card.id: (card.model_extra or {}).get("root") for card in cards}
        except openai.APIStatusError as error:
            if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                return None
            raise EndpointError(f"{self.base_url}: {_describe(error)}") from error
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.base_url}: {_describe(error)}") from error
        except (AttributeError, TypeError, ValueError):
            return None
        root = roots.get(self.model)
        return root if isinstance(root, str) and root else None

    async def _find_model(self) -> str:
        try:
            models = (await self._client.models.list()).data
            return models[0].id
        except openai.OpenAIError as error:
            expected = f"expected a list of models, got {_describe(error)}"
            raise EndpointError(f"{self.base_url}: {expected}; is the server up? --model names one") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise EndpointError(f"{self.base_url}: expected a list of models, got none; give --model") from error


def _read_text(content: Any) -> str:
    """Read an answer's text, or that of its parts: some servers give thoughts and text as parts, as messages have them.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError(f"an answer that is {type(content).__name__}")
    return content


def _read_count(count: object) -> int | None:
    """Read a number of tokens; None of what can be none."""
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < MOST_TOKENS else None


def _shorten(text: str) -> str:
    """Shorten a body to the beginning of it, in one line."""
    return " ".join(text.split())[:200]


def _describe(error: openai.OpenAIError) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}: {_shorten(error.response.text)}"
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"
