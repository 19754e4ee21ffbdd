"""The arms of a GRPO comparison: their figures by hand, their picture, and whose folder is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from laguna_serve.scripts import grpo
from laguna_serve.scripts.grpo_arms import run as grpo_arms
from laguna_serve.scripts.grpo_arms.plot import draw_arms
from laguna_serve.scripts.grpo_arms.report import render_markdown
from laguna_serve.scripts.grpo_arms.result import (
    Arm,
    ArmRun,
    ArmsResult,
    find_gains,
    pool_tau,
    summarise,
)
from laguna_serve.scripts.training.rl.config import GrpoConfig
from laguna_serve.scripts.training.rl.refresh.notes import DrafterNote, GateNote, LiveNote
from laguna_serve.scripts.training.rl.run import GrpoResult
from laguna_serve.scripts.training.rl.steps import HeldOut, Step, StepSeconds
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import RunDirError

ENVIRONMENT = Environment(date="2026-01-01", command="python scripts/grpo_arms", other_load=0.25)


def describe(out: Path, **changes: Any) -> grpo_arms.ArmsConfig:
    settings: dict[str, Any] = {"model": "m", "draft": "d", "out": out, "steps": 2}
    return grpo_arms.ArmsConfig(**settings | changes)


def gate(pushed: bool) -> GateNote:
    return GateNote(
        candidate="d-1:step-1",
        pushed=pushed,
        serving_tau=1.4,
        candidate_tau=1.5,
        p_worse=0.01,
        prompts=8,
        rollouts=10,
        greedy=2,
        loss=0.5,
    )


def make_run(arm: Arm, tau: float | None, folder: Path) -> ArmRun:
    """Two steps of 100 tokens: 2 s of the engine, 3 of learning, 1 of the push, and 4 of refreshes where there are."""
    refresh = 4.0 if arm == "refreshed" else None
    seconds = StepSeconds(rollouts=2.0, learning=3.0, push=1.0, refresh=refresh)
    live = LiveNote(places=7, live=1.6, frozen=1.3, p_below=1.0)
    notes = [
        DrafterNote(version="d-0", gate=gate(True)),
        DrafterNote(version="d-1:step-1", live=live, gate=gate(False)),
    ]
    log = [
        Step(
            step=number,
            version=f"step-{number}",
            reward=0.5,
            held_out_reward=0.3 if number == 0 else None,
            held_out_greedy_length=4.0 if number == 0 and tau is not None else None,
            acceptance_length=tau,
            tokens=100,
            drafts=None if tau is None else 50,
            seconds=seconds,
            processor_s=seconds,
            drafter=notes[number] if arm == "refreshed" else None,
        )
        for number in range(2)
    ]
    greedy = None if tau is None else 3.5
    last = Step(step=2, version="step-2", held_out_reward=0.95, held_out_greedy_length=greedy)
    run = describe(folder).describe(arm, 0).decisive
    return ArmRun(arm=arm, seed=0, environment=ENVIRONMENT, run=run, log=(*log, last))


@pytest.fixture
def result(tmp_path: Path) -> ArmsResult:
    taus: dict[Arm, float | None] = {"frozen": 1.4, "refreshed": 1.8, "none": None}
    runs = tuple(make_run(arm, tau, tmp_path) for arm, tau in taus.items())
    summaries = tuple(summarise(run, 0.9) for run in runs)
    return ArmsResult(goal=0.9, runs=runs, summaries=summaries, gains=find_gains(summaries))


def test_figures_are_those_worked_out_by_hand(result: ArmsResult) -> None:
    frozen, refreshed, none = result.summaries
    assert (frozen.tau_last, refreshed.tau_last, none.tau_last) == (pytest.approx(1.4), pytest.approx(1.8), None)
    assert result.gains == {"0": pytest.approx(2.0)}
    assert result.holds
    assert refreshed.frozen_tau_last == pytest.approx(1.3)
    assert refreshed.tokens_per_core_s == pytest.approx(200 / 4)
    assert refreshed.with_refresh_per_core_s == pytest.approx(200 / 12)
    assert refreshed.refresh_share == pytest.approx(8 / 20)
    assert refreshed.seconds_to_goal == pytest.approx(20)
    assert none.core_s_to_goal == pytest.approx(12)
    assert (refreshed.pushed, refreshed.refused, refreshed.rolled_back) == (1, 1, 0)
    assert (frozen.greedy_first, frozen.greedy_last) == (4.0, 3.5)
    assert summarise(result.runs[0], 0.99).seconds_to_goal is None


def test_acceptance_is_pooled_over_drafts() -> None:
    steps = [
        Step(step=i, version="v", acceptance_length=tau, drafts=n) for i, (tau, n) in enumerate([(2, 10), (1, 30)])
    ]
    assert pool_tau(steps) == pytest.approx(1.25)
    assert pool_tau([Step(step=0, version="v")]) is None


def test_without_both_arms_nothing_is_gained(result: ArmsResult) -> None:
    assert find_gains(result.summaries[:1]) == {}
    assert not ArmsResult(goal=0.9, runs=(), summaries=(), gains={}).holds


@pytest.mark.slow
def test_table_and_picture(result: ArmsResult, tmp_path: Path) -> None:
    text = render_markdown(result)
    assert "| refreshed drafter | 0 | 0.300 → 0.950 | 1.80 → 1.80 | 4.00 → 3.50 |" in text
    assert "2.00 (seed 0)" in text
    assert "25%" in text
    draw_arms(result, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 20_000


def test_finished_run_is_read_and_another_one_is_refused(tmp_path: Path) -> None:
    config = describe(tmp_path).describe("frozen", 0)
    run = make_run("frozen", 1.4, tmp_path)
    held_out = HeldOut(first=0.3, last=0.95, prompts=4)
    config.out.mkdir()
    write_result(
        config.out / "grpo.json",
        GrpoResult(environment=ENVIRONMENT, run=run.run, log=run.log, held_out_reward=held_out),
    )
    assert grpo_arms.run_arm(config).log == run.log
    for other in (describe(tmp_path, steps=3), describe(tmp_path, gamma="adaptive")):
        with pytest.raises(RunDirError, match="another one's"):
            grpo_arms.run_arm(other.describe("frozen", 0))


def test_a_finished_run_is_printed_again_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine, which would draw the answers of its last step anew."""

    def refuse(config: GrpoConfig) -> GrpoResult:
        raise CommandError(f"{config.steps} steps: trained")

    monkeypatch.setattr(grpo, "train_policy", refuse)
    config = describe(tmp_path).describe("frozen", 0)
    run = make_run("frozen", 1.4, tmp_path)
    config.out.mkdir()
    held_out = HeldOut(first=0.3, last=0.95, prompts=4)
    result = GrpoResult(environment=ENVIRONMENT, run=run.run, log=run.log, held_out_reward=held_out)
    write_result(config.out / "grpo.json", result)
    before = (config.out / "grpo.json").read_bytes()
    assert grpo.run(config, always_json=False) == 0
    assert "held-out reward 0.300 → 0.950" in capsys.readouterr().out
    assert (config.out / "grpo.json").read_bytes() == before
    for other in (describe(tmp_path, steps=3), describe(tmp_path, gamma="adaptive")):
        with pytest.raises(CommandError, match="trained"):
            grpo.run(other.describe("frozen", 0), always_json=False)


def test_unfinished_runs_are_compared_over_the_steps_that_all_have(tmp_path: Path) -> None:
    config = describe(tmp_path, arms=("frozen", "none"), so_far=True)
    for arm, steps in (("frozen", 2), ("none", 1)):
        folder = tmp_path / f"{arm}-0"
        folder.mkdir()
        log = make_run("frozen", 1.4, tmp_path).log[:steps]
        (folder / "log.jsonl").write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in log))
    assert [len(run.log) for run in grpo_arms.read_so_far(config)] == [1, 1]
    with pytest.raises(RunDirError, match="refreshed-0"):
        grpo_arms.read_so_far(describe(tmp_path, so_far=True))
    log = tmp_path / "frozen-0" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])  # its run is writing the second step
    assert [len(run.log) for run in grpo_arms.read_so_far(config)] == [1, 1]
    log.write_text('{"step": "x"}\n')
    with pytest.raises(RunDirError, match=r"log.jsonl: expected a run's steps, got a line where .*; choose another"):
        grpo_arms.read_so_far(config)


def test_arms_differ_in_their_drafter_alone(tmp_path: Path) -> None:
    config = describe(tmp_path, gamma="adaptive")
    frozen, refreshed, none = (config.describe(arm, 3) for arm in grpo_arms.ARMS)
    assert (frozen.draft, frozen.gamma, frozen.refresh) == ("d", "adaptive", None)
    assert refreshed.refresh is not None
    assert refreshed.draft == "d"
    assert (none.draft, none.gamma, none.draft_sampling) == (None, None, "greedy")
    assert len({c.out for c in (frozen, refreshed, none)}) == 3
    assert {c.seed for c in (frozen, refreshed, none)} == {3}


@pytest.mark.parametrize("changes", [{"seeds": ()}, {"seeds": (1, 1)}, {"arms": ()}, {"arms": ("none", "none")}])
def test_unusable_lists_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="expected different"):
        describe(tmp_path, **changes)
