"""One engine at a time on mock engines: the order of the passes, drift, what is kept, and equal figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ab_harness import TIMED, MockLauncher, common_flags, mock_launchers
from mock_engine import START, Clock, MockEngine, Rollouts, Settings, Weights
from rollout_launcher import GAMMA, RolloutLauncher

from laguna_serve.bench import ab, gamma_sweep, rollouts
from laguna_serve.bench.arms import arms
from laguna_serve.bench.gamma import plot as gamma_plot
from laguna_serve.bench.harness.in_turn import Passes
from laguna_serve.bench.rollout import plot as rollouts_plot
from laguna_serve.bench.rollout import points as rollouts_points
from laguna_serve.bench.rollout.result import INCONCLUSIVE, LOSES, PAYS, Turn
from laguna_serve.serving.client import counters
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning import launch

TOY = Path(__file__).resolve().parents[2] / "toy"
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")]
Step = Callable[[EngineConfig], Settings | BaseException]


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(gamma_plot, "draw", lambda _result, path: path.write_bytes(b""))


@pytest.fixture
def sweep(
    clock: Clock,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, dict[str, Any], list[int | None], str]]:
    """Run a sweep in turn on mocks that `behave` by their configuration; status, last line, γ started, stderr."""

    def run(
        *more: str, behave: Step | None = None, order: Sequence[str] = ("--sequential",)
    ) -> tuple[int, dict[str, Any], list[int | None], str]:
        plain, drafting = (
            Settings(clock=clock, delay_s=0.002),
            Settings(clock=clock, delay_s=0.002, gamma=3, chunk_tokens=3),
        )
        size = ["--prompts", str(prompts_file), "--num-prompts", "9", "--max-tokens", "12"]
        with mock_launchers(monkeypatch, plain, drafting) as made:

            def choose(engine: MockLauncher, config: EngineConfig) -> Settings:
                chosen = behave(config) if behave is not None else made.both[config.draft is not None]
                if isinstance(chosen, BaseException):
                    raise chosen
                return chosen

            monkeypatch.setattr(made, "choose", choose)
            status = gamma_sweep.main([*PAIR, *size, *order, "--out", str(tmp_path / "out"), *more])
            started = [config.gamma for config in made.configs]
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, started, captured.err

    return run


def read_points(tmp_path: Path) -> dict[int, dict[str, Any]]:
    return {point["gamma"]: point for point in json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]}


@pytest.mark.slow
def test_sweep_runs_plain_decoding_first_and_last(sweep: Any, tmp_path: Path) -> None:
    status, result, started, err = sweep("--gammas", "1,3")
    assert (status, started) == (0, [None, 1, 3, None])
    assert "one engine at a time, the baseline first and last" in err
    assert result["workload"]["sequential"] is True
    for point in read_points(tmp_path).values():
        assert point["speedup"] == pytest.approx(3)
        assert point["drift"]["ratio"] == pytest.approx(1)
        assert point["step_cost"] == pytest.approx(1)
        assert point["parity"]["control"] == {"prompts": 9, "mismatches": 0}
        assert point["draft_share"] == pytest.approx(0)
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert "one engine at a time, plain decoding first and last" in page
    assert "the baseline's last pass is 1.000 times as fast as its first" in page
    assert sweep("--gammas", "1,3")[2] == [], "everything is there"
    assert sweep("--gammas", "1,2,3")[2] == [2, None], "the pass that ended the sweep begins the next"


@pytest.mark.slow
def test_sweep_goes_on_where_it_was_interrupted(sweep: Any, clock: Clock, tmp_path: Path) -> None:
    def interrupt(config: EngineConfig) -> Settings | BaseException:
        if config.gamma == 3:
            return KeyboardInterrupt()
        return Settings(clock=clock, delay_s=0.002, **({"gamma": 3, "chunk_tokens": 3} if config.draft else {}))

    status, _, started, err = sweep("--gammas", "1,3", behave=interrupt)
    assert status == 130
    assert "the same command continues" in err
    assert started == [None, 1]
    status, _, started, err = sweep("--gammas", "1,3")
    # What is measured now has its own pass of plain decoding before it, which is the one after what was measured then.
    assert (status, started) == (0, [None, 3, None])
    assert "continuing: 2 passes are there" in err
    assert set(read_points(tmp_path)) == {1, 3}
    names = sorted(path.name for path in (tmp_path / "out" / "points" / "passes").glob("*.json"))
    order = ("baseline", "gamma1", "baseline", "gamma3", "baseline")
    assert names == [f"{number:03d}.{arm}.c1.json" for number, arm in enumerate(order, start=1)]


def test_drift_is_shown_and_in_the_interval(sweep: Any, clock: Clock, tmp_path: Path) -> None:
    delays = iter([0.002, 0.002, 0.003])

    def slow_down(config: EngineConfig) -> Settings:
        drafting = {"gamma": 3, "chunk_tokens": 3} if config.draft else {}
        return Settings(clock=clock, delay_s=next(delays), **drafting)

    status, _, _, _ = sweep("--gammas", "3", behave=slow_down)
    assert status == 0
    point = read_points(tmp_path)[3]
    assert point["drift"]["ratio"] == pytest.approx(2 / 3)
    assert point["speedup"] == pytest.approx(3.75)
    assert point["ci95"] == pytest.approx([3, 4.5])  # against the first pass, and against the last
    assert "more than 5% apart" in (tmp_path / "out" / "sweep.md").read_text()


@pytest.mark.slow
def test_gamma_that_fails_does_not_lose_the_others_in_turn(sweep: Any, clock: Clock) -> None:
    def fail(config: EngineConfig) -> Settings | BaseException:
        if config.gamma == 1:
            return EngineError("engine fake: no memory for one")
        return Settings(clock=clock, delay_s=0.002, **({"gamma": 3, "chunk_tokens": 3} if config.draft else {}))

    status, result, started, _ = sweep("--gammas", "1,3", behave=fail)
    assert (status, started) == (1, [None, 3, None])
    assert result["failed"] == {"1": "engine fake: no memory for one"}
    assert result["points"] == 1
    assert sweep("--gammas", "1,3")[2] == [1, None], "and is tried again"


@pytest.mark.slow
def test_pass_with_a_failed_request_is_not_kept(sweep: Any, clock: Clock, tmp_path: Path) -> None:
    def fail(config: EngineConfig) -> Settings:
        faults = {TIMED[2]: "http_500"} if config.draft else {}
        drafting = {"gamma": 3, "chunk_tokens": 3} if config.draft else {}
        return Settings(clock=clock, delay_s=0.002, faults=faults, **drafting)

    status, _, _, err = sweep("--gammas", "3", behave=fail)
    assert status == 2
    assert "1 of the gamma3's requests failed (prompt p2" in err
    assert [path.name for path in (tmp_path / "out" / "points" / "passes").glob("*.json")] == ["001.baseline.c1.json"]


@pytest.mark.slow
def test_ablations_and_answers_that_differ_in_turn(sweep: Any, clock: Clock, tmp_path: Path) -> None:
    def behave(config: EngineConfig) -> Settings:
        drafting = {"gamma": 3, "chunk_tokens": 3, "flips": {TIMED[1]: 4}} if config.draft else {}
        return Settings(clock=clock, delay_s=0.002, margin=0.0, **drafting)

    status, result, started, _ = sweep("--gammas", "3", "--stack", "prefix-caching", behave=behave)
    assert (status, started) == (0, [None, 3, None, None, None, 3, None])
    point = read_points(tmp_path)[3]
    assert point["parity"]["classes"] == {"tie": 1, "near_tie": 0, "defect": 0}
    (ablation,) = result["stack"]
    assert ablation["speedup"] == pytest.approx(3)
    assert ablation["drift"]["ratio"] == pytest.approx(1)
    assert ablation["differ_from_plain_target"] == 0
    assert sweep("--gammas", "3", "--stack", "prefix-caching", behave=behave)[2] == []


@pytest.mark.parametrize(("order", "expected"), [([], [None, 3, None]), (["--no-sequential"], [None, 3])])
def test_too_little_memory_for_both_goes_in_turn(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, order: list[str], expected: list[int | None]
) -> None:
    monkeypatch.setattr(launch, "find_device", lambda _install: Device("cpu", "a small one", 5 << 30, 5 << 30))
    status, result, started, err = sweep("--gammas", "3", order=order)
    assert (status, started) == (0, expected)
    assert result["workload"]["sequential"] is not bool(order)
    said = "and a small one has 5.0 GiB for them: one engine at a time, the baseline first and last"
    assert (said in err) is not bool(order)


def test_ab_in_turn_pools_both_passes_of_the_baseline(
    clock: Clock,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, drafting = (
        Settings(clock=clock, delay_s=0.002),
        Settings(clock=clock, delay_s=0.002, gamma=3, chunk_tokens=3),
    )
    with mock_launchers(monkeypatch, plain, drafting) as made:
        delays = iter([0.002, 0.002, 0.0022])
        monkeypatch.setattr(
            made, "choose", lambda _, config: replace(made.both[config.draft is not None], delay_s=next(delays))
        )
        assert ab.main([*PAIR, "--sequential", *common_flags(prompts_file, tmp_path)]) == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "ab.json").read_text())
    assert result["speedup"]["point"] == pytest.approx(3 * 1.05)
    assert result["speedup"]["ci95"] == pytest.approx([3, 3.3])
    assert result["drift"]["ratio"] == pytest.approx(1 / 1.1)
    assert result["arms"]["baseline"]["requests"] == 20
    assert result["arms"]["candidate"]["requests"] == 10
    assert result["parity"]["control"] == {"prompts": 10, "mismatches": 0}
    assert "one engine at a time, the baseline first and last" in " ".join(output.split())
    assert "drift       the baseline's last pass is 0.909 times as fast as its first" in output


def test_ab_in_turn_without_its_last_pass_tells_no_speedup(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock_launchers(monkeypatch, Settings(), Settings(gamma=3, chunk_tokens=3)) as made:
        behaviour = iter([Settings(), Settings(gamma=3, chunk_tokens=3), Settings(die_after=9)])
        monkeypatch.setattr(made, "choose", lambda *_: next(behaviour))
        assert ab.main([*PAIR, "--sequential", *common_flags(prompts_file, tmp_path)]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["speedup"]["point"] is None
    assert "drift" not in result
    reasons = [item["reason"] for item in result["refused"] if item["figure"] == "speedup"]
    assert any("the baseline's last pass, which shows a drift, is not whole" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("made", "planned"),
    [
        ([], ["baseline", "a", "b", "baseline"]),
        (["baseline"], ["a", "b", "baseline"]),
        (["baseline", "a"], ["baseline", "b", "baseline"]),
        (["baseline", "a", "b"], ["baseline"]),
        (["baseline", "a", "baseline"], ["b", "baseline"]),
        (["baseline", "a", "b", "baseline"], []),
    ],
)
def test_passes_that_are_missing(tmp_path: Path, made: list[str], planned: list[str]) -> None:
    passes = Passes(tmp_path / "passes", Turn)
    for arm in made:
        passes.add(arm, "batch8-version-v1.2", Turn(1, 1.0, 1.0, Counters()))
    assert passes.plan("batch8-version-v1.2", ["a", "b"]) == planned
    assert passes.plan("batch8", ["a"]) == ["baseline", "a", "baseline"], "each part by itself"


def test_pass_is_between_the_nearest_of_the_baseline(tmp_path: Path) -> None:
    passes = Passes(tmp_path / "passes", Turn)
    for number, arm in enumerate(["baseline", "a", "baseline", "b", "baseline"]):
        passes.add(arm, "c1", Turn(number, 1.0, 1.0, Counters()))
    for arm, tokens in (("a", [0, 1, 2]), ("b", [2, 3, 4])):
        bracket = passes.find_bracket(arm, "c1")
        assert bracket is not None
        assert [turn.tokens for turn in bracket] == tokens
    passes.add("c", "c1", Turn(5, 1.0, 1.0, Counters()))
    assert passes.find_bracket("c", "c1") is None


@pytest.fixture
def roll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], type[RolloutLauncher]]]:
    """Rollouts in turn on mocks; status, last line, and the engines that were started."""
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{index}():"}) + "\n" for index in range(20)))
    for name in ("v1", "v2"):
        shutil.copytree(TOY / "teacher", tmp_path / name)
    monkeypatch.setattr(counters, "POLL_S", 0.001)
    monkeypatch.setattr(rollouts_plot, "draw", lambda _result, path: path.write_bytes(b""))

    def run(*more: str, **behaviour: Any) -> tuple[int, dict[str, Any], type[RolloutLauncher]]:
        clock = behaviour.setdefault("clock", Clock())
        engines = type("Made", (RolloutLauncher,), {"tau": {START: 4, "v1": 2, "v2": 1}, **behaviour})
        monkeypatch.setattr(arms, "Engine", engines)
        monkeypatch.setattr(rollouts_points, "time", clock)
        monkeypatch.setattr(rollouts_points, "read_cpu_s", lambda _pids: 2 * clock.now_s)
        size = ["--prompts", str(prompts), "--rounds", "8", "--max-tokens", "16", "--out", str(tmp_path / "out")]
        versions = ["--versions", str(tmp_path / "v1"), str(tmp_path / "v2")]
        status = rollouts.main([*PAIR, *size, "--sequential", "--batch", "1,8", *versions, *more])
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {"said": captured.err}, engines

    return run


@pytest.mark.slow
def test_rollouts_in_turn_say_what_interleaved_ones_say(roll: Any, tmp_path: Path) -> None:
    status, result, engines = roll()
    assert status == 1
    assert [config.draft is not None for config in engines.configs] == [False, True, False]
    assert result["workload"]["sequential"] is True
    assert [(p["version"], p["acceptance"]["length"], p["verdict"]) for p in result["versions"]] == [
        (None, 4, PAYS),
        ("v1", 2, INCONCLUSIVE),
        ("v2", 1, LOSES),
    ]
    for point in [*result["points"], *result["versions"]]:
        assert point["drift"]["ratio"] == pytest.approx(1, abs=0.05)
        assert point["tokens"] == 8 * 16 * point["batch"]
    assert 1.8 < result["points"][0]["ratio"]["point"] < 2.2
    page = (tmp_path / "out" / "rollouts.md").read_text()
    assert "one engine at a time, plain decoding first and last" in page
    assert "batch 8, version v2: the baseline's last pass is" in page
    assert roll()[2].started == 0


@pytest.mark.slow
def test_rollouts_in_turn_go_on_after_a_death(roll: Any) -> None:
    status, _, engines = roll(die_after=15)
    assert (status, engines.started) == (2, 3)  # plain, speculating for one batch, and plain to close that
    status, result, engines = roll()
    assert [config.draft is not None for config in engines.configs] == [True, False]
    assert [point["batch"] for point in result["points"]] == [1, 8]


@pytest.mark.slow
def test_rollouts_by_url(roll: Any) -> None:
    clock = Clock()
    tau = {START: 4, "v1": 2, "v2": 1}
    plain = Settings(says=Rollouts(tau), weights=Weights(), clock=clock)
    drafting = replace(plain, says=Rollouts(tau, 2.0), weights=Weights(), gamma=GAMMA)
    with MockEngine(plain) as ours, MockEngine(drafting) as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", f"7={theirs.url}", "--model", "fake"]
        _, result, engines = roll(*urls, clock=clock)
    assert engines.started == 0
    assert result.get("device") == "url", result
    assert result["gamma"] == 7
    assert result["points"][0]["device_ratio"] is None
    assert result["points"][0]["verdict"] == PAYS


@pytest.mark.parametrize(("gamma", "status"), [(3, 0), (5, 2)])
def test_sweep_by_url(sweep: Any, clock: Clock, tmp_path: Path, gamma: int, status: int) -> None:
    plain = Settings(clock=clock, delay_s=0.002)
    with MockEngine(plain) as ours, MockEngine(replace(plain, gamma=3, chunk_tokens=3)) as theirs:
        urls = ["--baseline-url", ours.url, "--candidate-url", f"{gamma}={theirs.url}", "--model", "fake"]
        got, result, started, err = sweep(*urls)
    assert (got, started) == (status, [])
    if status:
        assert re.search("no γ could be measured: γ 5: .* got 3 by its counters.*; the same command continues", err)
        return
    assert result["stored"] is None
    assert read_points(tmp_path)[3]["speedup"] == pytest.approx(3)
    assert read_points(tmp_path)[3]["memory"] == {"baseline": None, "candidate": None}


@pytest.mark.slow
def test_gamma_beyond_the_block_is_measured_marked_and_not_chosen(sweep: Any, tmp_path: Path) -> None:
    status, result, started, _ = sweep("--gammas", "7,9", "--beyond-block")
    assert (status, started) == (0, [None, 7, 9, None])
    points = read_points(tmp_path)
    assert [points[gamma]["beyond_block"] for gamma in (7, 9)] == [False, True]
    assert result["choices"][0]["gamma"] == 7
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert "| 1 | 9* |" in page
    assert "* beyond the drafter's block" in page


@pytest.mark.slow
def test_gammas_that_are_all_beyond_the_block_leave_nothing_to_choose(sweep: Any) -> None:
    status, result, _, _ = sweep("--gammas", "9", "--beyond-block", "--mixed", "--stack", "prefix-caching")
    assert status == 0
    assert result["stored"] is None
    assert [item["gamma"] for item in result["stack"]] == [9]
    assert result["choices"] == [
        {"concurrency": 1, "gamma": 0, "reason": "no γ within the drafter's block was measured"}
    ]
