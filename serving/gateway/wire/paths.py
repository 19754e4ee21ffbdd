"""Which paths engines serve to clients: a new one that vLLM has is added here.

Its other routes (pause, sleep, collective_rpc, profiling, …) steer the engine, and are reached over the admin port or
not at all. Checked against vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import Head

PUBLIC_PREFIXES = ("/v1/", "/v2/", "/cohere/", "/inference/v1/")
SCORING = ("/score", "/rerank", "/pooling", "/classify", "/generative_scoring")
PUBLIC_PATHS = frozenset(
    ("/tokenize", "/detokenize", "/tokenizer_info", "/invocations", "/version", "/load", "/ping", *SCORING)
)
# What vLLM answers by a model, besides SCORING, and what it tells of itself; other engines may have more.
# NEWER ones came with 0.33.
NEWER = frozenset(("/v1/decisions",))
ANSWERED = NEWER | frozenset(
    (
        *("/v1/completions", "/v1/completions/render", "/v1/completions/derender", "/v1/chat/completions"),
        *("/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/chat/completions/derender"),
        *("/v1/responses", "/v1/responses/render", "/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"),
        *("/cohere/v2/chat", "/cohere/v2/chat/render", "/inference/v1/generate", "/v1/systemone"),
        *("/v1/embeddings", "/v2/embed", "/v1/score", "/v1/rerank", "/v2/rerank"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/tokenize", "/detokenize", "/invocations", *SCORING),
    )
)
TOLD = frozenset(("/v1/models", "/v1/realtime", "/version", "/load", "/ping", "/tokenizer_info"))
# Answers that an engine has stored: another one has none of them.
STORED = "/v1/responses/"
# Under those prefixes, and not for clients.
NOT_PUBLIC = frozenset(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests"))


def check_path(head: Head, more: Iterable[str]) -> None:
    """Check that a path is one that engines serve to clients, or one of `more`.

    Raises:
        GatewayError: 400 it could leave the engine's root or be read differently by two servers, 404 it is none.
    """
    raw, path = head.target.partition(b"?")[0], head.path
    if (b"%" in raw or b"." in raw or b"//" in raw or b"\\" in raw) and _is_hidden(head.method, raw.lower(), path):
        raise errors.bad_request(
            "Invalid URL: the path has dot segments, control characters, or slashes that are doubled or encoded."
        )
    public = path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)
    if not (public and path.rstrip("/") not in NOT_PUBLIC) and path not in more:
        raise errors.unknown_path(head.method, head.path)


def check_loads(head: Head, more: Iterable[str], model: str, absent: Container[str]) -> None:
    """Check that a request is worth loading a model for, whose engine lacks the paths of `absent`.

    Raises:
        GatewayError: 404 vLLM, or this engine, would not know its path, 503 it asks for no answer of a model's.
    """
    path = head.path.removesuffix("/")  # vLLM redirects such a one
    answered = path in ANSWERED or head.path in more
    if not (answered or path in TOLD or head.path.startswith(STORED)):
        raise errors.unknown_path(head.method, head.path)
    if path in absent and head.path not in more:
        raise errors.unserved_path(head.method, head.path, model)
    # OPTIONS need no key: whatever they bring, nothing is loaded, nor ended, for strangers.
    if head.method != "POST" or not answered:
        raise errors.not_loaded()


def _is_hidden(method: str, raw: bytes, path: str) -> bool:
    if not path.isprintable():
        return True  # Starlette takes a path for the one without the line end behind it
    segments = path.split("/")
    marks: tuple[bytes, ...] = (b"%2f", b"%5c", b"\\", b"//")
    if method in ("GET", "HEAD") and path.startswith("/v1/models/"):
        marks = marks[1:]  # OpenAI's clients ask for org/name as org%2Fname; the answer is the gateway's own
    return ".." in segments or "." in segments or any(mark in raw for mark in marks)
