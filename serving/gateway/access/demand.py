"""What a request asks of its key, told by its body: at least how many tokens it will cost, by an estimate.

The estimate is what is taken from the limits until the engine tells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

BYTES_PER_TOKEN = 4
MOST_TOKENS = 1 << 31
# What makes tokens. For other paths (embeddings, scores) a body is all that is counted beforehand.
MAKING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate")
FREE = frozenset(("/tokenize", "/detokenize", "/v1/messages/count_tokens"))


class _Body(msgspec.Struct):
    """What of it may be of any type: to refuse that is the engine's business."""

    model: str | None = None
    stream: Any = None
    n: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    stream_options: Any = UNSET
    priority: Any = UNSET


class Asked(_Body):
    """What the gateway reads of a body; all else is skipped, not decoded.

    `is_json`: it is an object. `plain`: it is JSON as everybody reads it, in UTF-8, and can be edited as bytes. Fields
    of these names that a body has are written over.
    """

    is_json: bool = False
    plain: bool = False


class Demand(NamedTuple):
    """Tokens, estimated: of the prompt, and of the answer at most."""

    prompt: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt + self.output


NOTHING = Demand()


def is_free(method: str, path: str) -> bool:
    """Whether an answer costs nothing, whatever it tells of tokens: it counts them, or repeats what was made before."""
    return method != "POST" or path in FREE


def estimate(path: str, asked: Asked, size: int, assumed_output: int) -> Demand:
    """Estimate what a request with a body of `size` bytes costs; `assumed_output` where it does not say."""
    if not asked.is_json or path in FREE:
        return NOTHING
    prompt = -(-size // BYTES_PER_TOKEN)
    if not path.startswith(MAKING):
        return Demand(prompt)
    each, times = assumed_output, 1 if asked.n is None else _read_count(asked.n) or 1
    for given in (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens):
        if given is not None and (count := _read_count(given)) is not None:
            each = count
            break
    return Demand(prompt, min(MOST_TOKENS, each * times))


def _read_count(value: Any) -> int | None:
    return min(value, MOST_TOKENS) if type(value) is int and value >= 0 else None
