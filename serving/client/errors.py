"""What goes wrong with an endpoint."""

from __future__ import annotations

from laguna_serve.serving.kit.errors import CommandError


class EndpointError(CommandError, RuntimeError):
    """An endpoint that gave no answer, or not the one that its API promises; one line."""


class RefusedError(EndpointError):
    """An endpoint that does not take a request for what is in it: a prompt longer than its context, say."""


# What an answer's end is called by the OpenAI API, and by vLLM and other servers that answer like it; in lower case.
OPENAI_ENDS = ("stop", "length", "tool_calls", "function_call")
OTHER_ENDS = (
    *("repetition", "eos", "eos_token", "stop_sequence", "end_turn"),
    *("tool_use", "complete", "max_tokens", "model_length"),
)
ENDS = frozenset((*OPENAI_ENDS, *OTHER_ENDS))


def find_broken_end(reason: object) -> str | None:
    """Say that an answer was broken off, as of "abort"; None of one that ended, and where a server does not say."""
    if not isinstance(reason, str) or reason.lower() in ENDS:
        return None
    return f"expected a whole answer, got finish_reason {reason[:40]!r}"
