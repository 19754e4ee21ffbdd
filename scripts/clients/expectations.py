"""What the checks of Python clients share: the server, the questions, what is expected of an answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

URL, LOST, MODEL = os.environ["CLIENTS_URL"], os.environ["CLIENTS_LOST_URL"], os.environ["CLIENTS_MODEL"]
REGEX, SCHEMA = os.environ["CLIENTS_CALL_REGEX"], json.loads(os.environ["CLIENTS_CALL_SCHEMA"])
# The checks to run, all by default.
CHECKS = os.environ["CLIENTS_CHECKS"].split(",") if "CLIENTS_CHECKS" in os.environ else None
KEY = "sk-dummy"
ASK = "def add(a, b):"
MESSAGES: list[Any] = [{"role": "user", "content": ASK}]
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["path", "count"],
}
TOOL: dict[str, Any] = {"name": "read", "description": "Reads a file", "parameters": PARAMETERS}
CHAT_TOOL: Any = {"type": "function", "function": TOOL}
FORCED = {"structured_outputs": {"regex": REGEX}}
THINK = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 8}
FEW, MANY = 24, 160
Checks = dict[str, Callable[[], str]]


class UnmetError(Exception):
    """Something other than what the client's users expect."""


def expect(holds: object, what: str) -> None:
    """Raise UnmetError unless it holds."""
    if not holds:
        raise UnmetError(what)


def expect_text(text: str | None) -> str:
    """Expect an answer's first words."""
    expect(text, "text, got none")
    return repr(str(text)[:30])


def expect_pieces(whole: str, parts: Sequence[str]) -> None:
    """Expect a stream that says the same as the whole answer, in more than two pieces."""
    expect("".join(parts) == whole and len(parts) > 2, f"{whole!r} in pieces, got {parts}")


def read_deltas(chunks: Iterable[Any]) -> list[str]:
    """Read the pieces of text in a chat completion's stream."""
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def expect_call(name: object, arguments: object) -> str:
    """Expect the forced tool call, as its parts."""
    got: Any = json.loads(arguments) if isinstance(arguments, str) else arguments
    expect(name == "read" and isinstance(got, dict), f"a call of read, got {name!r}({got!r})")
    expect(isinstance(got["path"], str) and isinstance(got["count"], int), f"path and count, got {got!r}")
    return f"read({json.dumps(got)})"


def refused(error: type[BaseException], call: Callable[[], object]) -> str:
    """Return what is said when the server refuses; it must be the client's own error class."""
    try:
        call()
    except error as got:
        return f"{type(got).__name__}: {str(got)[:100]}"
    raise UnmetError("an error, got an answer")


def lost(stream: Callable[[], Iterable[object]]) -> str:
    """Expect a stream whose engine is lost after a few events to end in an error, not as if it were complete."""
    seen = 0
    try:
        for _ in stream():
            seen += 1
    except UnmetError:
        raise
    except Exception as got:
        expect(seen, f"events before the error, got none and {got!r}")
        return f"{type(got).__name__} after {seen} events: {str(got)[:80]}"
    raise UnmetError(f"an error, got a normal end after {seen} events")
