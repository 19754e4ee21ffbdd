"""Counts tokens from the usage that an answer tells near its end."""

from __future__ import annotations

import re

from laguna_serve.serving.gateway.telemetry.metrics import EngineStats

# What has more digits is no count: neither the file of usage nor Python would take it.
OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s?(\d{1,12})(?!\d)')
PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s?(\d{1,12})(?!\d)')


# In a usage, of which so much may lie in the piece before.
COUNT, USAGE_BYTES = b'_tokens"', 256


def keep_usage(recent: tuple[bytes, bytes], data: bytes) -> tuple[bytes, bytes]:
    """Keep the last two pieces of a body, or the one with its usage: ids and log-probabilities may follow that."""
    if COUNT in data:
        return recent[1][-USAGE_BYTES:], data
    return recent if COUNT in recent[1] else (recent[1], data)


def read_usage(end: bytes) -> tuple[int, int] | None:
    """Read tokens of the prompt and of the answer from the last of an answer's body; None where it does not tell."""
    prompt, output = PROMPT_TOKENS.findall(end), OUTPUT_TOKENS.findall(end)
    if not (prompt or output):
        return None
    return int(prompt[-1]) if prompt else 0, int(output[-1]) if output else 0


def count_tokens(stats: EngineStats, end: bytes, spread_s: float | None) -> tuple[int, int] | None:
    """Add what `end` tells, and return it as `read_usage`. `spread_s`: from a stream's first bytes to its last."""
    if (usage := read_usage(end)) is None:
        return None
    prompt, output = usage
    stats.tokens += output
    stats.prompt_tokens += prompt
    if spread_s is not None and output > 1:
        stats.itl.add(spread_s / (output - 1))
    return usage
