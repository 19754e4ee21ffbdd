"""vLLM's counters: parsing, differences, and waiting for those that lag."""

from __future__ import annotations

import asyncio
import threading

import pytest
from mock_engine import MockEngine, Settings

from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.counters import (
    Counters,
    parse_counters,
    scrape_counters,
    scrape_denoising_steps,
    settle_counters,
)
from laguna_serve.serving.client.errors import EndpointError

EXPOSITION = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a, b"} 1200.0
vllm:generation_tokens_total{engine="1",model_name="a, b"} 34.0
vllm:generation_tokens_created{engine="0",model_name="a, b"} 1.7e+09
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 9.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0
vllm:spec_decode_num_drafts_total{engine="0"} 100.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 1.0e+03
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 130.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 80.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="10"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 49.0
"""


@pytest.mark.parametrize(
    "line",
    [
        "vllm:generation_tokens_total NaN",
        "vllm:generation_tokens_total +Inf",
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="first"} 1',
    ],
)
def test_counters_that_are_no_numbers_are_one_line(line: str) -> None:
    with pytest.raises(EndpointError, match="expected whole numbers of vllm:"):
        parse_counters(f"{EXPOSITION}{line}\n")


def test_parsing_adds_engines_and_orders_positions() -> None:
    found = parse_counters(EXPOSITION)
    assert (found.generation_tokens, found.requests) == (1234, 10)
    assert (found.drafts, found.draft_tokens, found.accepted_tokens) == (100, 1000, 130)
    assert found.accepted_per_position == (80, 49, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert found.prefix_cache_hits == 0


def test_counters_that_are_not_vllms_are_refused() -> None:
    with pytest.raises(EndpointError, match="disable-log-stats"):
        parse_counters("process_cpu_seconds_total 3.0\n")


def test_a_difference_starts_at_zero_where_a_counter_is_new() -> None:
    before = Counters(drafts=1, accepted_tokens=3)
    after = Counters(drafts=5, accepted_tokens=9, accepted_per_position=(4, 2))
    moved = after.since(before)
    assert (moved.drafts, moved.accepted_tokens, moved.accepted_per_position) == (4, 6, (4, 2))


def test_denoising_steps_are_those_of_all_engines_or_none() -> None:
    async def scrape(engine: MockEngine) -> int | None:
        async with open_session() as session:
            return await scrape_denoising_steps(session, engine.url)

    with MockEngine(Settings()) as engine:
        assert asyncio.run(scrape(engine)) is None
        name = "vllm:diffusion_num_denoising_steps_total"
        engine.counters.render = lambda: f'{name}{{engine="0"}} 40.0\n{name}{{engine="1"}} 2.0\n'  # type: ignore[method-assign]
        assert asyncio.run(scrape(engine)) == 42


def test_settling_waits_for_counters_that_lag() -> None:
    async def settle(engine: MockEngine) -> int:
        async with open_session() as session:
            before = await scrape_counters(session, engine.url)
            threading.Timer(0.2, setattr, (engine.counters, "generation", 40)).start()
            return (await settle_counters(session, engine.url, before, 40)).generation_tokens

    with MockEngine(Settings()) as engine:
        assert asyncio.run(settle(engine)) == 40


def test_settling_gives_up_in_time() -> None:
    async def settle(engine: MockEngine) -> int:
        async with open_session() as session:
            before = await scrape_counters(session, engine.url)
            return (await settle_counters(session, engine.url, before, 40, settle_s=0.2)).generation_tokens

    with MockEngine(Settings()) as engine:
        assert asyncio.run(settle(engine)) == 0


def test_other_metrics_with_positions_are_not_acceptance() -> None:
    line = 'vllm:spec_decode_num_draft_tokens_per_pos_total{engine="0",position="0"} 100.0\n'
    assert parse_counters(EXPOSITION + line) == parse_counters(EXPOSITION)
