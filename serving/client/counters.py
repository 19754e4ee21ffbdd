"""vLLM's counters, read from /metrics and differenced over the measured requests alone.

Acceptance length is 1 + Δaccepted / Δdrafts. (Δdraft_tokens / Δdrafts + 1 is γ + 1 whatever was accepted.)
Source of the names: vllm/v1/spec_decode/metrics.py and vllm/v1/metrics/loggers.py, which Prometheus suffixes `_total`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from laguna_serve.serving.client.completions import find_root
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.exposition import read_samples

SETTLE_S = 5.0
POLL_S = 0.05

NAMES = {
    "vllm:spec_decode_num_drafts_total": "drafts",
    "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:request_success_total": "requests",
}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
# Of masked diffusion alone, so not among the counters of all results.
DENOISING_STEPS = "vllm:diffusion_num_denoising_steps_total"


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters at one moment, or their difference between two. `accepted_per_position[i]`: draft token i accepted."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    generation_tokens: int = 0
    prompt_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    requests: int = 0
    accepted_per_position: tuple[int, ...] = ()

    def since(self, before: Counters) -> Counters:
        """Return what was counted between `before` and now."""
        positions = range(len(self.accepted_per_position))
        earlier = before.accepted_per_position or (0,) * len(positions)
        return Counters(
            **{name: getattr(self, name) - getattr(before, name) for name in NAMES.values()},
            accepted_per_position=tuple(self.accepted_per_position[i] - earlier[i] for i in positions),
        )


def sum_counters(parts: Sequence[Counters]) -> Counters:
    """Sum what was counted in all of them together."""
    positions = zip(*(part.accepted_per_position for part in parts), strict=True)
    return Counters(
        **{name: sum(getattr(part, name) for part in parts) for name in NAMES.values()},
        accepted_per_position=tuple(map(sum, positions)),
    )


def parse_counters(text: str) -> Counters:
    """Read vLLM's counters; samples that differ only in labels (several engines) are added up.

    Raises:
        EndpointError: vLLM's token counter is not there, or a counter is no number.
    """
    sums: Counter[str] = Counter()
    per_position: Counter[int] = Counter()
    for sample in read_samples(text):
        try:
            if sample.name in NAMES:
                sums[NAMES[sample.name]] += int(sample.value)
            elif sample.name == PER_POSITION and "position" in sample.labels:
                per_position[int(sample.labels["position"])] += int(sample.value)
        except (ValueError, OverflowError):
            got = f"{sample.value} {sample.labels}"
            raise EndpointError(f"/metrics: expected whole numbers of {sample.name}, got {got}") from None
    if "generation_tokens" not in sums:
        raise EndpointError(
            "/metrics: expected vllm:generation_tokens_total, got none; "
            "measure a vLLM server started without --disable-log-stats"
        )
    width = max(per_position, default=-1) + 1
    return Counters(**sums, accepted_per_position=tuple(per_position[i] for i in range(width)))


async def scrape_counters(session: aiohttp.ClientSession, base_url: str) -> Counters:
    """Read the counters now.

    Raises:
        EndpointError: /metrics does not answer, or is not vLLM's.
    """
    return parse_counters(await _fetch_metrics(session, base_url))


async def scrape_denoising_steps(session: aiohttp.ClientSession, base_url: str) -> int | None:
    """Read the steps of masked diffusion that were made so far; None of an engine that counts none.

    Raises:
        EndpointError: /metrics does not answer.
    """
    samples = read_samples(await _fetch_metrics(session, base_url))
    steps = [int(sample.value) for sample in samples if sample.name == DENOISING_STEPS]
    return sum(steps) if steps else None


async def _fetch_metrics(session: aiohttp.ClientSession, base_url: str) -> str:
    url = find_root(base_url) + "/metrics"
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=30.0)) as response:
            response.raise_for_status()
            return await response.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EndpointError(f"{url}: expected vLLM's counters, got {type(error).__name__}: {error}") from error


async def settle_counters(
    session: aiohttp.ClientSession, base_url: str, before: Counters, expected_tokens: int, settle_s: float = SETTLE_S
) -> Counters:
    """Counters lag the end of a stream a little: read until the expected tokens are counted, or `settle_s` is over.

    One more reading follows, so that counts arriving in the same breath (the last drafts, somebody else's) are seen.
    """
    deadline = time.monotonic() + settle_s
    now = await scrape_counters(session, base_url)
    while now.generation_tokens - before.generation_tokens < expected_tokens and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        now = await scrape_counters(session, base_url)
    await asyncio.sleep(POLL_S)
    return await scrape_counters(session, base_url)


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Acceptance over the counted drafts.

    Attributes:
        length: tokens per verification step, 1 + accepted / drafts.
        rate: accepted / drafted tokens.
        per_position: for each position of a draft, the share of drafts whose token there was accepted.
    """

    length: float
    rate: float
    per_position: list[float]
    drafts: int
    draft_tokens: int
    accepted_tokens: int


def summarise_acceptance(delta: Counters) -> Acceptance | None:
    """Summarise acceptance over a difference of counters; None when nothing was drafted."""
    if delta.drafts <= 0 or delta.draft_tokens <= 0:
        return None
    return Acceptance(
        length=1 + delta.accepted_tokens / delta.drafts,
        rate=delta.accepted_tokens / delta.draft_tokens,
        per_position=[count / delta.drafts for count in delta.accepted_per_position],
        drafts=delta.drafts,
        draft_tokens=delta.draft_tokens,
        accepted_tokens=delta.accepted_tokens,
    )
