"""Decisions on a real engine: the tokens do not depend on them, and no context of the drafter's is lost by any."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probes import run_probe
from sequential_toy import make_sequential

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"


@pytest.fixture(scope="module", params=["dflash", pytest.param("head", marks=pytest.mark.slow)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was decided and drafted, by the toy's drafter, and by one with a sequential head without a prefix cache."""
    head = request.param == "head"
    drafter = make_sequential(tmp_path_factory.mktemp("head") / "drafter", out_std=0.05) if head else TOY / "dflash"
    ran: dict[str, Any] = run_probe("adaptive_probe.py", str(TOY), str(drafter), "uncached" if head else "cached")
    return ran


@pytest.mark.parametrize(
    ("window", "caching", "expected"),
    [(128, False, ["write"]), (None, False, {"gone": 0}), (None, True, {"gone": 256, "new": 1000})],
)
def test_context_is_written_before_its_blocks_are_others(window: int | None, caching: bool, expected: object) -> None:
    """vLLM takes them back from requests that go on, and says so to nobody: of the target's own keys, even."""
    from vllm.model_executor.layers.attention import Attention

    from laguna_serve.plugins.adaptive.runner import AdaptiveModelRunner

    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.sliding_window = window
    done: list[Any] = []
    runner = SimpleNamespace(
        drafter=SimpleNamespace(model=torch.nn.Sequential(torch.nn.Identity(), attention)),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_cache_config=SimpleNamespace(hash_block_size=128),
        requests={"gone": SimpleNamespace(num_prompt_tokens=200, output_token_ids=[1] * 100)},
        max_model_len=1000,
        _context=SimpleNamespace(end=lambda model, unread: done.append(unread)),
        _write_context=lambda: done.append("write"),
        _pass_time=lambda act: act(),
    )
    runner._find_unread = partial(AdaptiveModelRunner._find_unread, runner)
    runner._drafter_slides = AdaptiveModelRunner._drafter_slides.func(runner)
    output = SimpleNamespace(
        finished_req_ids={"gone"},
        preempted_req_ids={"new"} if caching else None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    )
    AdaptiveModelRunner._care_for_context(runner, output)
    assert done == (expected if window else [expected])


def test_tokens_are_the_same_whatever_is_decided(report: dict[str, Any]) -> None:
    assert report["never"]["proposals"] == {}, "a step without drafts leaves the drafter's pass out"
    assert report["mixed"]["accepted"] > 30
    assert report["mixed"]["tokens"] == report["never"]["tokens"]
    assert report["seeded mixed"]["tokens"] == report["seeded never"]["tokens"] != report["never"]["tokens"]


def test_context_waits_and_is_written_before_the_next_draft(report: dict[str, Any]) -> None:
    every, seldom = report["every"]["proposals"], report["seldom"]["proposals"]
    assert 3 <= len(seldom) < len(every) // 4
    assert seldom == {place: every[place] for place in seldom}


def test_context_of_requests_that_end_is_written_for_a_prefix_cache_alone(report: dict[str, Any]) -> None:
    ended = report["after none"]
    assert (ended["written"] > 100) == (ended["cached"] > 0)
    assert report["seldom"]["written"] > 0


def test_context_is_there_for_who_finds_it_in_the_prefix_cache(report: dict[str, Any]) -> None:
    if not report["after none"]["cached"]:
        pytest.skip("this engine has no prefix cache")
    assert report["after none"]["cached"] == report["after drafts"]["cached"] >= 128
    assert report["after none"]["proposals"] == report["after drafts"]["proposals"] != {}


def test_requests_that_ended_are_forgotten(report: dict[str, Any]) -> None:
    assert report["seldom"]["known"] <= 1
