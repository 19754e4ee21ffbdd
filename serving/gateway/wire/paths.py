"""Which paths engines serve to clients: a new one that vLLM has is added here.

Its other routes (pause, sleep, collective_rpc, profiling, …) steer the engine, and are reached over the admin port or
not at all. Checked against vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Iterable

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.headers import Head

PUBLIC_PREFIXES = ("/v1/", "/v2/", "/cohere/", "/inference/v1/")
SCORING = ("/score", "/rerank", "/pooling", "/classify", "/generative_scoring")
PUBLIC_PATHS = frozenset(
    ("/tokenize", "/detokenize", "/tokenizer_info", "/invocations", "/version", "/load", "/ping", *SCORING)
)
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
    if not ((path.startswith(PUBLIC_PREFIXES) or path in PUBLIC_PATHS) and path not in NOT_PUBLIC) and path not in more:
        raise errors.unknown_path(head.method, head.path)


def _is_hidden(method: str, raw: bytes, path: str) -> bool:
    if not path.isprintable():
        return True  # Starlette takes a path for the one without the line end behind it
    segments = path.split("/")
    marks: tuple[bytes, ...] = (b"%2f", b"%5c", b"\\", b"//")
    if method in ("GET", "HEAD") and path.startswith("/v1/models/"):
        marks = marks[1:]  # OpenAI's clients ask for org/name as org%2Fname; the answer is the gateway's own
    return ".." in segments or "." in segments or any(mark in raw for mark in marks)
