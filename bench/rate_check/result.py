"""The result of bench/crosscheck.py, schema laguna_serve.crosscheck/1."""

from __future__ import annotations

import statistics

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.serving.kit.tables import Table

VLLM, CLIENT = "vllm_bench", "ours"
NAMES = {VLLM: "vllm bench serve", CLIENT: "this client"}


class Recorded(Struct, frozen=True, kw_only=True):
    """Where and when a published result was measured, added by hand."""

    date: str
    host: str
    versions: dict[str, str]
    server: str
    command: str
    note: str


class CrosscheckResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.crosscheck/1"):
    """Both clients' tok/s round by round; `ratio`: this client's median ÷ vLLM's."""

    prompts: int
    max_tokens: int
    concurrency: int
    tok_per_s: dict[str, list[float]]
    ratio: float
    mark: float
    held: bool
    recorded: Recorded | UnsetType = UNSET


def render_text(result: CrosscheckResult) -> str:
    """Every round of both, and whether they agree."""
    rounds = len(result.tok_per_s[VLLM])
    rows = [
        [NAMES[side], *(f"{rate:.1f}" for rate in rates), f"{statistics.median(rates):.1f}"]
        for side, rates in result.tok_per_s.items()
    ]
    heads = ["tok/s", *(f"round {index + 1}" for index in range(rounds)), "median"]
    verdict = "within" if result.held else "OUTSIDE"
    table = Table("l" + "r" * (rounds + 1), heads, rows).to_text()
    return f"{table}\nthis client ÷ vllm bench serve: {result.ratio:.4f}, {verdict} the mark of ±{result.mark:.0%}"
