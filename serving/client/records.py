"""What one request did: when it was sent, when each chunk of tokens arrived, and which tokens they were.

Tokens are counted by id (vLLM's `return_token_ids`), never by re-tokenising text and never by counting chunks: under
speculation one chunk carries several tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from laguna_serve.serving.client.errors import find_broken_end
from laguna_serve.serving.client.sse import DONE, SseParser
from laguna_serve.serving.kit.results import JsonObject


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `id` is the label used in results, `text` is sent as it is.

    Of a conversation `chat` holds what a chat template takes (messages, tools, chat_template_kwargs), and `text` its
    JSON; sent are the token ids that the engine's own template makes of it. `max_tokens` is its answer's length where
    that is shorter than all answers are to be.
    """

    id: str
    text: str
    chat: JsonObject | None = field(default=None, compare=False)
    max_tokens: int | None = None


@dataclass(slots=True)
class RawStream:
    """A streamed answer as it came off the socket; decoded later, so that decoding costs no time while others run.

    Times are `time.perf_counter_ns()`; `reads` holds (arrival, bytes) of every network read.
    """

    prompt_id: str
    started_ns: int
    ended_ns: int = 0
    reads: list[tuple[int, bytes]] = field(default_factory=list)
    error: str | None = None


class RequestRecord(Struct, frozen=True, kw_only=True):
    """A request in a result file; chunk times in ms after sending."""

    prompt_id: str
    started_ns: int
    wall_ms: float
    chunk_ms: list[float]
    chunk_tokens: list[int]
    token_ids: list[int]
    text: str
    prompt_tokens: int | None
    prompt_sha256: str | None
    finish_reason: str | None
    error: str | None


@dataclass(slots=True)
class Record:
    """One decoded request; `error` is None on success.

    `chunk_ns[i]` is when a chunk of `chunk_tokens[i]` ≥ 1 tokens arrived.
    """

    prompt_id: str
    started_ns: int
    ended_ns: int
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int | None = None
    prompt_sha256: str | None = None
    usage_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def text_bytes(self) -> bytes:
        """The text as bytes; a lone surrogate half, which JSON can carry, is kept rather than refused."""
        return self.text.encode("utf-8", "surrogatepass")

    def freeze(self) -> RequestRecord:
        """Return the immutable record that result files hold."""
        return RequestRecord(
            prompt_id=self.prompt_id,
            started_ns=self.started_ns,
            wall_ms=(self.ended_ns - self.started_ns) / 1e6,
            chunk_ms=[(ns - self.started_ns) / 1e6 for ns in self.chunk_ns],
            chunk_tokens=self.chunk_tokens,
            token_ids=self.token_ids,
            text=self.text,
            prompt_tokens=self.prompt_tokens,
            prompt_sha256=self.prompt_sha256,
            finish_reason=self.finish_reason,
            error=self.error,
        )


def decode_stream(raw: RawStream) -> Record:
    """Decode a stream; whatever makes it unusable for measuring becomes `error`, and what did arrive is kept."""
    record = Record(raw.prompt_id, raw.started_ns, raw.ended_ns, error=raw.error)
    parser = SseParser()
    done = False
    for arrived_ns, chunk in raw.reads:
        for payload in parser.feed(chunk):
            if payload == DONE:
                done = True
            elif record.error is None:
                try:
                    record.error = _take_event(record, json.loads(payload), arrived_ns)
                except (ValueError, TypeError, LookupError, AttributeError):
                    record.error = f"stream: expected a completion chunk in JSON, got {payload[:80]!r}"
    if record.error is None:
        record.error = _find_fault(record, done)
    return record


def _take_event(record: Record, event: JsonObject, arrived_ns: int) -> str | None:
    """Add one event to the record; return the error that it reports, if it does."""
    if event.get("error") is not None:
        return f"error event in the stream: {_message(event['error'])}"
    if event.get("usage"):
        record.usage_tokens = event["usage"].get("completion_tokens")
    if not event.get("choices"):
        return None
    choice = event["choices"][0]
    if choice.get("prompt_token_ids") is not None:
        record.prompt_tokens, record.prompt_sha256 = _fingerprint(choice["prompt_token_ids"])
    record.text += choice.get("text") or ""
    record.finish_reason = choice.get("finish_reason") or record.finish_reason
    token_ids = choice.get("token_ids") or []
    if token_ids:
        record.token_ids += token_ids
        record.chunk_ns.append(arrived_ns)
        record.chunk_tokens.append(len(token_ids))
    return None


def _find_fault(record: Record, done: bool) -> str | None:
    if not done:
        return f"stream: expected a closing [DONE], got the end of the body after {len(record.token_ids)} tokens"
    if (broken := find_broken_end(record.finish_reason)) is not None:
        return f"stream: {broken} after {len(record.token_ids)} tokens"
    if not record.token_ids:
        return "stream: expected token_ids in its chunks, got none; the engine must support return_token_ids"
    if record.usage_tokens is not None and record.usage_tokens != len(record.token_ids):
        return f"stream: expected {record.usage_tokens} token ids as usage says, got {len(record.token_ids)}"
    return None


def _fingerprint(token_ids: list[int]) -> tuple[int, str]:
    return len(token_ids), hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
