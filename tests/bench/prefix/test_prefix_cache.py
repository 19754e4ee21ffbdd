"""Acceptance under prefix caching: what is planned, how verdicts come about, and real engines.

One of them has a drafter that was made to lose its context on a hit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ab_harness import MockLauncher, mock_launchers
from mock_engine import Settings

from laguna_serve.bench import prefix_cache
from laguna_serve.bench.harness.prompts import PromptsError
from laguna_serve.bench.prefix import runner
from laguna_serve.bench.prefix.report import render_markdown, render_text
from laguna_serve.bench.prefix.result import ComparisonResult, PrefixCacheResult
from laguna_serve.bench.prefix.runner import Outcome, _send_round
from laguna_serve.bench.prefix.traffic import (
    GROUP,
    Comparison,
    EngineSetting,
    Scenario,
    Traffic,
    join_prompts,
    plan_second_turn,
    plan_traffic,
)
from laguna_serve.bench.prefix.verdict import compare, describe
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result

TOY = Path(__file__).resolve().parents[2] / "toy"
COMMAND = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash"), "--prompts", str(TOY / "prompts.jsonl")]
# Once a prompt was begun behind its first token (a prefix hit), nothing of the context is written any more until one
# is begun at the front: what would happen if the engine took a hit's draft context for written when it is not.
DEFECT = """
from laguna_serve.plugins.models import dflash_cpu

def register():
    drafter = dflash_cpu.DFlashLagunaForCausalLM
    write = drafter.store_taps
    state = {"lost": False}

    def lose(self, taps, positions, slots):
        if len(positions) > 8:
            state["lost"] = bool(positions[0] > 0)
        if not state["lost"]:
            write(self, taps, positions, slots)

    drafter.store_taps = lose
"""


def outcome(
    steps: list[tuple[int, ...]],
    *,
    copies: int = 1,
    sampled: bool = False,
    joined: bool = False,
    **counted_too: int,
) -> Outcome:
    """Requests by the tokens of their steps, sent so many at once. `joined`: the server sent steps two in a chunk."""
    prompts = tuple(Prompt(str(i), f"text {i // copies}") for i in range(len(steps)))
    rounds = tuple(prompts[i : i + copies] for i in range(0, len(prompts), copies))
    records, readings = [], {0: Counters()}
    drafts = accepted = 0
    for prompt, (first, *rest) in zip(prompts, steps, strict=True):
        drafts, accepted = drafts + len(rest), accepted + sum(rest) - len(rest)
        chunks = [first, *(sum(rest[i : i + 2]) for i in range(0, len(rest), 2))] if joined else [first, *rest]
        tokens = [7] * (first + sum(rest))
        records.append(Record(prompt.id, 0, 1, list(range(len(chunks))), chunks, tokens))
        if len(records) % copies == 0:
            readings[len(records)] = Counters(drafts=drafts, draft_tokens=7 * drafts, accepted_tokens=accepted)
    readings[len(records)] = replace(readings[len(records)], **counted_too)
    return Outcome(Scenario("s", "e", rounds, sampled), records, readings)


def judge(after: Outcome, before: Outcome, provoked_by: str | None = None) -> ComparisonResult:
    return compare(Comparison("c", "s", "s", provoked_by), after, before, seed=0)


GOOD = [(1, 4, 4, 3), (1, 3, 5, 4), (1, 4, 3, 5), (1, 5, 4, 4)] * 3
BAD = [(1, 1, 2, 1), (1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 2, 2)] * 3


@pytest.mark.slow
def test_lost_acceptance_falls() -> None:
    found = judge(outcome(BAD), outcome(GOOD))
    assert found.verdict == "falls"
    assert found.ratio == pytest.approx((48 / 36) / (144 / 36), rel=1e-6)
    assert found.ci95[0] < found.ratio < found.ci95[1] < 0.6


def test_equal_acceptance_holds() -> None:
    found = judge(outcome(GOOD), outcome(GOOD))
    assert (found.verdict, found.ratio, found.ci95, found.differing) == ("holds", 1.0, (1.0, 1.0), 0)


def test_small_loss_within_the_noise_holds() -> None:
    few = [(1, 4, 4, 3), (1, 1, 8, 4), (1, 4, 1, 8)]
    assert judge(outcome(few), outcome(GOOD[:3])).verdict == "holds"


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ([(1, 4, 4, 3)] * 8 + [(1, 1, 1, 1)], "cannot tell"),
        ([(1, 4, 4, 3)] * 2 + [(1, 1, 1, 1)] * 7, "falls"),
        # Of a handful the interval of so many draws says little: each pair has to show the same.
        ([(1, 4, 4, 3)] * 6 + [(1, 4, 3, 3)], "cannot tell"),
        ([(1, 4, 4, 3)] * 6 + [(1, 1, 1, 1)], "cannot tell"),
        ([(1, 4, 4, 3)] * 7, "holds"),
        ([(1, 4, 3, 3)] * 2, "falls"),
    ],
)
def test_what_the_interval_or_few_pairs_leave_open_cannot_be_told(steps: list[tuple[int, ...]], verdict: str) -> None:
    assert judge(outcome(steps), outcome([(1, 4, 4, 3)] * len(steps))).verdict == verdict


def test_scenario_that_did_not_happen_proves_nothing() -> None:
    assert judge(outcome(GOOD), outcome(GOOD), "preemptions").verdict == "not provoked: preemptions stayed 0"
    assert judge(outcome(GOOD, preemptions=2), outcome(GOOD), "preemptions").verdict == "holds"


def test_steps_that_a_lagging_server_sends_in_one_chunk_count_as_the_steps_they_are() -> None:
    found = judge(outcome(GOOD, joined=True), outcome(GOOD))
    assert (found.verdict, found.ratio, found.ci95) == ("holds", 1.0, (1.0, 1.0))
    assert found.ratio_by_chunks == pytest.approx(1.5)
    hidden = judge(outcome(BAD, joined=True), outcome(GOOD))
    assert (hidden.verdict, hidden.ratio) == ("falls", judge(outcome(BAD), outcome(GOOD)).ratio)


@pytest.mark.parametrize("sampled", [False, True])
def test_what_is_sent_together_is_one_pair(sampled: bool) -> None:
    found = judge(outcome(GOOD, copies=2, sampled=sampled), outcome(GOOD, copies=2, sampled=sampled))
    assert found.pairs == len(GOOD) / 2
    assert found.differing == (None if sampled else 0)


def test_prompts_sent_together_are_paired_with_the_same_prompts_sent_alone() -> None:
    found = judge(outcome(BAD, copies=4, preemptions=1), outcome(GOOD), "preemptions")
    assert (found.pairs, found.verdict) == (3, "falls")
    assert found.ratio == judge(outcome(BAD), outcome(GOOD)).ratio


def test_differing_tokens_are_counted() -> None:
    other = outcome(GOOD)
    other.records[3].token_ids[2] = 8
    assert judge(other, outcome(GOOD)).differing == 1


def test_hits_stand_beside_those_without_a_drafter() -> None:
    row = describe(outcome(GOOD), outcome(GOOD, prefix_cache_queries=200, prefix_cache_hits=104))
    assert (row.hit_rate, row.plain_hit_rate) == (0.0, 0.52)


def test_scenario_is_described() -> None:
    row = describe(outcome(GOOD, prefix_cache_queries=200, prefix_cache_hits=150, preemptions=3))
    assert row.acceptance == pytest.approx(144 / 36)
    assert row.tokens_per_chunk == pytest.approx(4)
    assert (row.hit_rate, row.plain_hit_rate, row.preemptions, row.requests) == (0.75, None, 3, 12)


PROMPTS = [Prompt(f"p{i}", "x" * 100) for i in range(40)]


def test_prompts_are_joined_to_length() -> None:
    joined = join_prompts(PROMPTS, 250, 3)
    assert [prompt.id for prompt in joined] == ["p0+p1+p2", "p3+p4+p5", "p6+p7+p8"]
    assert all(len(prompt.text) >= 250 for prompt in joined)
    with pytest.raises(
        PromptsError,
        match="20 of 250 characters, got enough for 13; lower --num-prompts or --characters",
    ):
        join_prompts(PROMPTS, 250, 20)


def test_every_comparison_has_its_scenarios_on_the_right_engine() -> None:
    traffic = plan_traffic(PROMPTS, 4, (150, 300), 64, 32)
    names = {scenario.name for scenario in traffic.scenarios} | {"second turn", "second turn, warm"}
    engines = {engine.name for engine in traffic.engines}
    assert {c.scenario for c in traffic.comparisons} | {c.against for c in traffic.comparisons} <= names
    assert {scenario.engine for scenario in traffic.scenarios} == engines
    group = next(scenario for scenario in traffic.scenarios if scenario.sampled)
    assert all(len(prompts) == GROUP and len({p.text for p in prompts}) == 1 for prompts in group.rounds)


def test_sampled_requests_have_seeds_of_their_own_the_same_in_every_scenario() -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    class Heard:
        async def run_round(self, prompts: Any, fields: Any = None) -> list[str]:
            asked.extend((prompt.id, fields) for prompt in prompts)
            return [prompt.id for prompt in prompts]

    traffic = plan_traffic(PROMPTS, 4, (150, 300), 64, 32)
    for scenario in (one for one in traffic.scenarios if one.sampled):
        sent = asyncio.run(_send_round(Heard(), scenario.rounds[1], scenario, GROUP))  # type: ignore[arg-type]
        assert sent == [prompt.id for prompt in scenario.rounds[1]]
    first, second = asked[:GROUP], asked[GROUP:]
    assert first == second
    assert [fields["seed"] for _, fields in first] == list(range(GROUP, 2 * GROUP))
    assert all(fields["temperature"] == 1 for _, fields in first)


def test_cold_prompts_are_cold_and_warm_ones_warm() -> None:
    """Copies of a prompt that was asked alone before were called cold, with all of it in the cache."""
    sent: dict[str, set[str]] = {}
    prompts = [Prompt(f"p{i}", f"{i:03} " * 30) for i in range(40)]
    for scenario in plan_traffic(prompts, 8, (150, 300), 64, 32).scenarios:
        earlier = sent.setdefault(scenario.engine, set())
        texts = {prompt.text for prompt in scenario.prompts}
        name = scenario.name.removesuffix(", no drafter")
        if name.endswith(", cold"):
            begun = [a for a in texts for b in earlier if a.startswith(b[:50])]
            assert not begun, f"{scenario.name}: {begun}"
        if name.endswith(", warm"):
            assert texts <= earlier, scenario.name
        earlier |= texts


def test_second_turn_continues_the_answer() -> None:
    turn = plan_second_turn([Prompt("a", "ask"), Prompt("b", "other")], {"a": "answer"}, "caching")
    assert [prompt.text[:9] for prompt in turn.prompts] == ["askanswer"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prompts", "2"], "--num-prompts: expected at least 4, got 2"),
        (["--max-tokens", "1"], "expected at least 8"),
    ],
)
def test_bad_flags_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        prefix_cache.main([*COMMAND, "--out", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [*COMMAND[:-1], str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]
    assert prefix_cache.main(command) == 2
    assert "none.jsonl: expected a prompts file" in capsys.readouterr().err


def test_reports_say_what_was_found() -> None:
    comparison = judge(outcome(BAD), outcome(GOOD))
    result = PrefixCacheResult(
        environment=Environment(cpu="c", cores=2, date="d", command="python x", versions={"vllm": "1"}),
        model="m",
        draft="d",
        max_tokens=8,
        partial=True,
        comparisons=[comparison],
        scenarios=[describe(outcome(GOOD))],
    )
    assert "falls" in render_text(result)
    assert "partial" in render_text(result)
    page = render_markdown(result)
    low, high = comparison.ci95
    chunks = f"{comparison.ratio_by_chunks:.3f}"
    assert f"| c | 0.333 | {low:.3f}–{high:.3f} | {chunks} | 12 | " in page
    assert "`python x`" in page


@pytest.mark.vllm
def test_acceptance_holds_on_real_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = prefix_cache.main([*COMMAND, "--quick", "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [c["verdict"] for c in result["comparisons"]] == ["holds"] * 13
    assert code == 0
    scenarios = {row["name"]: row for row in json.loads((tmp_path / "prefix_cache.json").read_text())["scenarios"]}
    assert scenarios["prompts, cold"]["hit_rate"] == 0
    assert scenarios["prompts, warm"]["hit_rate"] > 0.5
    assert scenarios["single prompts, preempted"]["preemptions"] > 0
    shared = [row for row in scenarios.values() if row["plain_hit_rate"] is not None]
    assert len(shared) == 6
    assert all(row["hit_rate"] == row["plain_hit_rate"] for row in shared), "a drafter costs no hits"
    assert scenarios["prompts"]["acceptance"] > 2
    for comparison in result["comparisons"]:
        assert comparison["differing"] in (0, None), (
            "fp32 or not, the same rows are computed in the same batches of one"
        )


@pytest.mark.vllm
def test_lost_context_is_caught_on_real_engines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plant: Callable[[str], None],
) -> None:
    """On engines whose drafter loses its context on a hit: acceptance falls, and tokens do not change."""
    plant(DEFECT)
    plan = prefix_cache.plan_traffic

    def plan_two_engines(*arguments: Any) -> Any:
        traffic = plan(*arguments)
        wanted = tuple(engine for engine in traffic.engines if engine.name in ("no caching", "caching"))
        short = ("prompts", "prompts, cold", "prompts, warm")
        return replace(traffic, engines=wanted, scenarios=tuple(s for s in traffic.scenarios if s.name in short))

    monkeypatch.setattr(prefix_cache, "plan_traffic", plan_two_engines)
    code = prefix_cache.main([*COMMAND, "--quick", "--out", str(tmp_path / "out")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    verdicts = {comparison["name"]: comparison["verdict"] for comparison in result["comparisons"]}
    assert code == 1
    assert verdicts["warm against cold"] == "falls"
    assert verdicts["cold against no caching"] == "holds"
    warm = next(c for c in result["comparisons"] if c["name"] == "warm against cold")
    assert warm["differing"] == 0


@pytest.mark.slow
def test_engines_that_were_measured_are_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num-prompts", "4", "--max-tokens", "8", "--characters", "120", "--out", str(tmp_path / "out")]
    drafting = Settings(gamma=3, chunk_tokens=3)
    with mock_launchers(monkeypatch, drafting, drafting) as made:

        def interrupt(_engine: MockLauncher, _config: EngineConfig) -> Settings:
            if made.started == 2:
                raise KeyboardInterrupt
            return drafting

        with monkeypatch.context() as patch:
            patch.setattr(made, "choose", interrupt)
            assert prefix_cache.main([*COMMAND, *flags]) == 130
        partial = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert partial["partial"]
        prefix_cache.main([*COMMAND, *flags])
        assert made.started == 6, "two, and the four that were missing"
        captured = capsys.readouterr()
        whole = json.loads(captured.out.splitlines()[-1])
        assert "no caching: continuing, it was measured" in captured.err
        assert not whole["partial"]
        assert len(whole["comparisons"]) == 13
        assert [c for c in whole["comparisons"] if c["name"] in {p["name"] for p in partial["comparisons"]}] == partial[
            "comparisons"
        ]
        assert prefix_cache.main([*COMMAND, *flags, "--seed", "1"]) == 2
        assert "got another one's" in capsys.readouterr().err


def test_interrupted_run_is_partial_and_from_python_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_one(_config: Any, _traffic: Any, _progress: Any, outcomes: dict[str, Outcome]) -> None:
        outcomes["prompts"] = outcome(GOOD)
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix_cache, "run_engines", stop_after_one)
    monkeypatch.setattr(prefix_cache, "check_specs", lambda *_: None)
    config = prefix_cache.PrefixCacheConfig(
        model=str(TOY / "teacher"), draft=str(TOY / "dflash"), prompts=TOY / "prompts.jsonl", out=tmp_path
    )
    result = prefix_cache.measure_acceptance(config)
    assert (result.partial, len(result.scenarios), result.comparisons) == (True, 1, [])
    assert read_result(tmp_path / "prefix_cache.json", PrefixCacheResult) == result
    assert capsys.readouterr().out == ""
    assert prefix_cache.main([*COMMAND, "--out", str(tmp_path)]) == 130


@pytest.mark.parametrize(("provokes", "moved", "sent"), [("preemptions", 3, 3), ("preemptions", 9, 4), ("", 9, 1)])
def test_what_has_to_be_provoked_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, provokes: str, moved: int, sent: int
) -> None:
    """Until the counter moves, at most four times."""
    attempts = 0

    async def send(*_: Any) -> Outcome:
        nonlocal attempts
        attempts += 1
        return outcome(GOOD, preemptions=2 if attempts >= moved else 0)

    monkeypatch.setattr(runner, "_send", send)
    scenario, found = Scenario("s", "e", (), provokes=provokes), dict[str, Outcome]()
    config = prefix_cache.PrefixCacheConfig(
        model=str(TOY / "teacher"), draft=str(TOY / "dflash"), prompts=TOY / "prompts.jsonl", out=Path("out")
    )
    arm: Any = None
    traffic = Traffic((), (scenario,), (), ())
    setting = EngineSetting("e", False, ())
    asyncio.run(runner._run_scenarios(config, arm, setting, [scenario], traffic, Progress(quiet=True), found))
    assert attempts == sent
    assert found["s"].delta.preemptions == (2 if moved <= sent else 0)
