"""Routers that are simulated: chats that grow, caches that forget, and what each policy does with both."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from laguna_serve.bench.routing.__main__ import RoutingConfig, main, run_policy, simulate
from laguna_serve.bench.routing.chats import BLOCK_TOKENS, Request, make_trace
from laguna_serve.bench.routing.policies import POLICIES
from laguna_serve.bench.routing.replicas import Machine, Replica
from laguna_serve.bench.routing.result import RoutingResult
from laguna_serve.serving.kit.results import read_result

MACHINE = Machine(places=2, prefill_per_s=128.0, decode_s=0.5, cache_tokens=4 * BLOCK_TOKENS)


def ask(at_s: float, *blocks: int, answer: int = 2) -> Request:
    return Request(at_s, len(blocks) * BLOCK_TOKENS, blocks, answer)


def test_turns_of_a_session_begin_with_what_was_said() -> None:
    trace = make_trace(20, 1.0, seed=1)
    assert [request.at_s for request in trace] == sorted(request.at_s for request in trace)
    longest = max(trace, key=lambda request: len(request.blocks))
    earlier = [r for r in trace if r is not longest and longest.blocks[: len(r.blocks)] == r.blocks]
    assert earlier
    assert all(r.at_s < longest.at_s for r in earlier if len(r.blocks) > 32)  # longer than any system prompt
    assert trace == make_trace(20, 1.0, seed=1) != make_trace(20, 1.0, seed=2)


def test_a_replica_computes_what_its_cache_has_not() -> None:
    replica = Replica(MACHINE)
    first, again = replica.serve(ask(0.0, 1, 2)), replica.serve(ask(100.0, 1, 2, 3))
    assert (first.cached_tokens, first.first_s) == (0, 2.0)
    assert (again.cached_tokens, again.first_s) == (2 * BLOCK_TOKENS, 1.0)


def test_the_ends_of_the_oldest_prompts_are_forgotten_first() -> None:
    replica = Replica(MACHINE)
    replica.serve(ask(0.0, 1, 2, 3))
    replica.serve(ask(100.0, 4, 5))
    assert replica.serve(ask(200.0, 1, 2, 3)).cached_tokens == 2 * BLOCK_TOKENS


def test_requests_beyond_the_places_wait() -> None:
    replica = Replica(MACHINE)
    waits = [replica.serve(ask(0.0, at)).first_s for at in range(3)]
    assert waits == [1.0, 2.0, 3.0]  # the third has the place of the first, free at 2.0
    assert replica.in_flight == 3
    replica.advance(2.0)
    assert replica.in_flight == 2


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_uses_all_replicas(name: str) -> None:
    choose = POLICIES[name](random.Random(0))
    replicas = [Replica(MACHINE) for _ in range(4)]
    counts: Counter[int] = Counter()
    for at, request in enumerate(make_trace(100, 1.0, seed=0)):
        chosen = choose(request, replicas)
        replicas[chosen].serve(request)
        counts[chosen] += 1
        assert at < 4 or name != "round-robin" or max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(4))


def test_load_goes_before_prefixes_where_it_is_uneven() -> None:
    choose = POLICIES["prefix-aware"](random.Random(0))
    replicas = [Replica(Machine()) for _ in range(2)]
    first = choose(ask(0.0, 1, 2), replicas)
    assert choose(ask(0.0, 1, 2), replicas) == first
    for _ in range(17):
        replicas[first].serve(ask(0.0, 1, 2))
    assert choose(ask(0.0, 1, 2), replicas) != first


def test_prefix_aware_keeps_its_hits_as_replicas_are_added() -> None:
    hits = {
        (name, count): run_policy(name, make_trace(40 * count, 0.5 * count, 0), count, 0).hit_share
        for name in ("prefix-aware", "power-of-two")
        for count in (1, 8)
    }
    assert hits["prefix-aware", 1] == hits["power-of-two", 1]
    assert hits["prefix-aware", 8] > 0.9 * hits["prefix-aware", 1]
    assert hits["power-of-two", 8] < 0.8 * hits["power-of-two", 1]


def test_its_files_say_what_was_simulated(tmp_path: Path) -> None:
    result = simulate(RoutingConfig(replicas=(1, 2), sessions=5, out=tmp_path))
    assert read_result(tmp_path / "routing.json", RoutingResult).points == result.points
    assert (tmp_path / "routing.png").stat().st_size > 0
    assert "| 2 | prefix-aware |" in (tmp_path / "routing.md").read_text()


@pytest.mark.parametrize("flag", ["--replicas=0", "--sessions-per-s=0"])
def test_simulation_refuses_what_no_trace_can_have(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([flag, "--out", str(tmp_path)])
    assert f"{flag.partition('=')[0]}: expected at least" in capsys.readouterr().err
