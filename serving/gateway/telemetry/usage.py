"""Counts tokens from the usage that an answer tells near its end."""

from __future__ import annotations

import re

from laguna_serve.serving.gateway.telemetry.metrics import EngineStats

OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s?(\d+)')
PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s?(\d+)')


def count_tokens(stats: EngineStats, end: bytes, spread_s: float | None) -> None:
    """Add what `end`, the last of an answer's body, tells. `spread_s`: from a stream's first bytes to its last."""
    if not (found := OUTPUT_TOKENS.findall(end)):
        return
    tokens = int(found[-1])
    stats.tokens += tokens
    if prompt := PROMPT_TOKENS.findall(end):
        stats.prompt_tokens += int(prompt[-1])
    if spread_s is not None and tokens > 1:
        stats.itl.add(spread_s / (tokens - 1))
