"""The result of bench/prefix_cache.py: `prefix_cache.json`, schema laguna_serve.prefix_cache/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.results import JsonObject, to_json

HOLDS, FALLS, CANNOT_TELL = "holds", "falls", "cannot tell"


class ScenarioResult(Struct, frozen=True, kw_only=True):
    """What an engine did with one scenario.

    Attributes:
        acceptance: tokens per step by vLLM's counters, None where nothing was drafted; `tokens_per_chunk`: by chunks.
        hit_rate: the share of prompt tokens that the prefix cache had; `plain_hit_rate`: the same of an engine without
            a drafter that was sent the same, None where none was.
    """

    name: str
    engine: str
    requests: int
    prompt_tokens: int
    acceptance: float | None
    drafts: int
    per_position: list[float] | None
    tokens_per_chunk: float
    hit_rate: float
    preemptions: int
    plain_hit_rate: float | None = None


class ComparisonResult(Struct, frozen=True, kw_only=True):
    """Acceptance in one scenario ÷ that in another over the same prompts.

    Attributes:
        provoked_by: the counter that must have counted for it to mean anything.
        ratio: by vLLM's counters, as is the interval; `ratio_by_chunks`: by what the client saw, for comparison only.
        pairs: what was counted apart on both sides, and the interval was bootstrapped over.
        differing: requests whose tokens differ; None where they were sampled.
        verdict: "holds", "falls", "cannot tell" where the interval, or with few of them the pairs, lie on both sides
            of the limit, or why there is none.
    """

    name: str
    scenario: str
    against: str
    provoked_by: str | None
    ratio: float
    ratio_by_chunks: float
    ci95: tuple[float, float]
    pairs: int
    differing: int | None
    verdict: str


class PrefixCacheResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.prefix_cache/1"):
    """Acceptance under prefix caching; `partial`: the run was interrupted."""

    environment: Environment
    model: str
    draft: str
    max_tokens: int
    partial: bool
    comparisons: list[ComparisonResult]
    scenarios: list[ScenarioResult]

    @property
    def held(self) -> bool:
        """Acceptance falls nowhere, and everything could be provoked."""
        return all(comparison.verdict == HOLDS for comparison in self.comparisons)


def shorten(result: PrefixCacheResult) -> JsonObject:
    """Shorten a result to one line: of the scenarios their number."""
    return to_json(result) | {"scenarios": f"{len(result.scenarios)}, in the file"}
