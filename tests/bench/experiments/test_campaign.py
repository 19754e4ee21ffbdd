"""bench/campaign.py: what is planned, run, kept, repeated and left out, with small programs as steps."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from laguna_serve.bench import campaign
from laguna_serve.bench.experiments import plan, report, runner
from laguna_serve.bench.experiments.options import CampaignConfig
from laguna_serve.bench.experiments.plan import BUDGET_ENDED, is_finished, make_plan
from laguna_serve.bench.experiments.result import CampaignResult, StepRun
from laguna_serve.bench.experiments.runner import has_crashed
from laguna_serve.bench.experiments.step import OUT, PYTHON, XS2, XS2_DRAFT, Step
from laguna_serve.serving.kit.results import read_result
from laguna_serve.serving.kit.run_dir import hold_folder

DEADLINE_S = 60.0
# Ends with a status; the last line is a result that is known.
DOCTOR = '{"schema": "laguna_serve.doctor/1", "ok": true, "versions": {"torch": "1"}, "problems": []}'
SAY = (
    "import sys, pathlib; pathlib.Path(sys.argv[1], 'ran').open('a').write('x'); print(sys.argv[2]); sys.exit({status})"
)
# Starts another process in a session of its own, says which, and waits for both.
HANG = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
path = pathlib.Path(sys.argv[1], "child")
path.with_suffix(".part").write_text(str(child.pid))
path.with_suffix(".part").rename(path)
time.sleep(600)
"""


def make_step(name: str, *, code: str = SAY.format(status=0), work_s: int = 100, **options: Any) -> Step:
    command = (PYTHON, "-c", code, OUT, DOCTOR)
    given = {"part": "kernels", "row": 1, "command": command, "rehearsal": command, "expected": "much", "why": "so"}
    return Step(name=name, work_s=work_s, **{**given, **options})


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the campaign consist of these steps."""

    def use_steps(*steps: Step) -> None:
        monkeypatch.setattr(plan, "STEPS", steps)
        monkeypatch.setattr(report, "BY_NAME", {step.name: step for step in steps})

    return use_steps


def rehearse(out: Path, *flags: str) -> int:
    return campaign.main(["--rehearse", "--out", str(out), *flags])


def read(out: Path) -> CampaignResult:
    return read_result(out / "campaign.json", CampaignResult)


def count_runs(out: Path, folder: str) -> int:
    return len((out / "steps" / folder / "ran").read_text())


def wait_for(path: Path) -> str:
    """Its content, once it is there."""
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def assert_gone(pid: int) -> None:
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_plan_takes_what_fits_from_the_front_and_runs_nothing(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(make_step("a", work_s=50), make_step("b", work_s=60), make_step("c", work_s=10), make_step("d", by_hand="`do`"))
    assert campaign.main(["--plan", "--budget-min", "1.1", "--out", str(tmp_path / "out")]) == 0
    text, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    steps = {item["step"]: item["left_out"] for item in json.loads(line)["steps"]}
    assert steps["a"] is None
    assert steps["b"] == "takes about 60 s, and 16 s of the budget are left"
    assert steps["c"] is None
    assert steps["d"] == "by hand: `do`"
    assert "60 of 66 s planned, 2 steps" in text
    assert not (tmp_path / "out").exists()
    (tmp_path / "plan.json").touch()
    assert campaign.main(["--plan", "--out", str(tmp_path / "plan.json")]) == 2
    assert "expected a folder, got the file" in capsys.readouterr().err
    assert campaign.main(["--plan", "--rehearse", "--budget-min", "1.1"]) == 0
    assert "3 steps rehearsed, for 66 s at most" in capsys.readouterr().out


def test_step_that_crashes_has_not_fallen_short() -> None:
    """Python ends with the status of a benchmark that fell short; its last line is no result."""
    crash = [
        "row 1",
        "Traceback (most recent call last):",
        '  File "moe.py", line 1',
        "RuntimeError: CUDA error: illegal",
    ]
    assert has_crashed(crash)
    assert has_crashed([*crash, "nanobind: leaked 4 instances!"])
    assert not has_crashed([*crash, '{"schema": "laguna_serve.ab/1"}'])
    assert not has_crashed([*crash, "===== 1 failed, 3 passed in 2 s ====="])
    assert not has_crashed(["verdict: slower", '{"schema": "laguna_serve.ab/1"}'])


def make_run(step: str, outcome: str, **changes: Any) -> StepRun:
    about: dict[str, Any] = {
        "status": 0,
        "device": "H",
        "rehearsed": False,
        "commit": "c",
        "started": "",
        "wall_s": 10.0,
    }
    about |= {"estimate_s": 20, "command": [], "folder": f"steps/{step}", "schema": None, "figures": [], "reason": None}
    return StepRun(step=step, outcome=outcome, **about | changes)  # type: ignore[arg-type]


def test_checkpoint_that_is_gone_is_made_again_for_who_still_needs_it(tmp_path: Path) -> None:
    """The next machine has the journal, not what was made on the last one."""
    config = CampaignConfig(out=tmp_path)
    made, used = make_run("dense-generate", "held"), make_run("dense-ab", "held")
    assert not is_finished("dense-generate", {"dense-generate": [made]}, config)
    assert is_finished("dense-generate", {"dense-generate": [made], "dense-ab": [used]}, config)
    (tmp_path / "checkpoints" / "dense-random").mkdir(parents=True)
    (tmp_path / "checkpoints" / "dense-random" / "config.json").touch()
    assert is_finished("dense-generate", {"dense-generate": [made]}, config)


def test_step_that_used_up_a_budget_comes_last_in_the_next(use: Callable[..., None], tmp_path: Path) -> None:
    use(make_step("a", work_s=20), make_step("b", work_s=20))
    config = CampaignConfig(out=tmp_path)
    for wall_s, order in ((30.0, ["b", "a"]), (5.0, ["a", "b"])):
        stopped = make_run("a", "stopped", reason=BUDGET_ENDED, wall_s=wall_s)
        assert [item.step for item in make_plan(config, {"a": [stopped]}).steps] == order


def test_without_a_gpu_only_a_rehearsal_runs(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(make_step("a"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert campaign.main(["--out", str(tmp_path / "out")]) == 2
    assert "expected an NVIDIA GPU" in (said := capsys.readouterr().err)
    assert "--rehearse" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out: expected a folder"),
        (["--rehearse", "--out", "x", "--step", "nothing"], "--step: expected steps"),
        (["--rehearse", "--out", "x", "--part", "nothing"], "--part: expected one of kernels"),
        (["--rehearse", "--out", "x", "--budget-min", "0"], "--budget-min: expected at least 0.1"),
    ],
)
def test_refusals_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: int | str | None = campaign.main(flags)
    except SystemExit as end:
        status = end.code
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_in_the_place_of_folders_are_one_line(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(make_step("a"))
    (tmp_path / "file").touch()
    for flag, path in (("--out", tmp_path / "file" / "below"), ("--checkpoints", tmp_path / "file")):
        assert rehearse(tmp_path / "out", flag, str(path)) == 2
        assert capsys.readouterr().err == (
            f"campaign.py: error: {flag} {path}: expected a folder, got the file {tmp_path / 'file'}; choose another\n"
        )
    assert not (tmp_path / "out").exists()


def test_a_second_campaign_in_the_folder_is_told_before_it_runs_a_step(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ran the steps, in the same folders, and the first one ended when it wrote its first line."""
    use(make_step("a"))
    assert rehearse(tmp_path) == 0
    (tmp_path / "campaign.jsonl").unlink()
    with hold_folder(tmp_path):
        assert rehearse(tmp_path) == 2
        alone = r"expected to write alone, got another run at it( \(process \d+\))?; wait for its end"
        assert re.search(alone, capsys.readouterr().err)
        assert campaign.main(["--plan", "--rehearse", "--out", str(tmp_path)]) == 0
    assert count_runs(tmp_path, "a") == 1
    assert rehearse(tmp_path) == 0


def test_a_folder_of_measurements_takes_no_rehearsal(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(make_step("a"))
    assert rehearse(tmp_path / "out") == 0
    (tmp_path / "out" / "settings.sha256").write_text("a campaign's on a GPU")
    assert rehearse(tmp_path / "out") == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_finished_steps_are_not_repeated(use: Callable[..., None], tmp_path: Path) -> None:
    use(make_step("good"), make_step("short", code=SAY.format(status=1)))
    for _ in range(2):
        assert rehearse(tmp_path) == 1
        assert (count_runs(tmp_path, "good"), count_runs(tmp_path, "short")) == (1, 1)
    result = read(tmp_path)
    assert [run.outcome for run in result.runs] == ["held", "fell short"]
    assert result.runs[0].figures == ["all well", "torch 1"]
    assert result.left_out == {}


def test_results_of_another_checkpoint_are_not_taken(use: Callable[..., None], tmp_path: Path) -> None:
    command = (PYTHON, "-c", SAY.format(status=0), OUT, DOCTOR, XS2, XS2_DRAFT)
    use(make_step("published", rehearsal=command, needs=(XS2, XS2_DRAFT)), make_step("toy"))
    for model, draft in (("o/one", "o/two"), ("o/other", "o/two"), ("o/two", "o/one"), ("o/one", "o/two")):
        assert rehearse(tmp_path, "--xs2", model, "--xs2-draft", draft) == 0
    folders = [f"{run.folder} {' '.join(run.command[-2:])}" for run in read(tmp_path).runs if run.step == "published"]
    assert folders == [
        "steps/published o/one o/two",
        "steps/published-2 o/other o/two",
        "steps/published-3 o/two o/one",
    ]
    assert count_runs(tmp_path, "toy") == 1
    assert (
        campaign.plan_campaign(
            campaign.CampaignConfig(rehearse=True, plan=True, out=tmp_path, xs2="o/third", xs2_draft="o/two")
        )
        .steps[0]
        .left_out
        is None
    )


def test_a_checkpoint_is_known_by_its_content(use: Callable[..., None], tmp_path: Path) -> None:
    """Written anew it is another one; moved, or named from another folder, it is the same."""
    command = (PYTHON, "-c", SAY.format(status=0), OUT, DOCTOR, XS2)
    use(make_step("published", rehearsal=command, needs=(XS2,)), make_step("toy"))
    out, model, moved = (tmp_path / name for name in ("out", "model", "moved"))
    model.mkdir()
    for words in ("one", "another"):
        (model / "config.json").write_text(json.dumps({"is": words}))
        for _ in range(2):
            assert rehearse(out, "--xs2", str(model)) == 0
    model.rename(moved)
    assert rehearse(out, "--xs2", str(moved)) == 0
    assert [run.folder for run in read(out).runs] == ["steps/published", "steps/toy", "steps/published-2"]
    runs = [run.checkpoints for run in read(out).runs]
    assert [set(run) for run in runs] == [{XS2}, set(), {XS2}]
    assert runs[0] != runs[2]


def test_a_checkpoint_is_found_from_where_the_command_is(
    use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps run in the repository's folder."""
    use(make_step("published", rehearsal=(PYTHON, "-c", SAY.format(status=0), OUT, DOCTOR, XS2), needs=(XS2,)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rehearse(Path("out"), "--xs2", "here") == 0
    assert read(tmp_path / "out").runs[0].command[-1] == str(tmp_path / "here")
    assert rehearse(Path("other"), "--xs2", "nowhere") == 2
    assert "nowhere: expected an existing folder or a hub id" in capsys.readouterr().err
    assert not Path("other").exists()


@pytest.mark.slow
def test_two_models_may_differ(use: Callable[..., None], tmp_path: Path) -> None:
    use(
        make_step("models", code=SAY.format(status=1), falls_short=True),
        make_step("bad", code=SAY.format(status=3), falls_short=True),
        # Whose rehearsal prescribes nothing.
        make_step("prescribed", code=SAY.format(status=1), falls_short=True, synthetic=True),
    )
    assert rehearse(tmp_path) == 1
    assert [run.outcome for run in read(tmp_path).runs] == ["held", "failed", "fell short"]


@pytest.mark.slow
def test_failed_step_is_retried_once_and_only_when_asked(use: Callable[..., None], tmp_path: Path) -> None:
    use(make_step("bad", code=SAY.format(status=3)), make_step("good"))
    assert rehearse(tmp_path) == 1
    assert read(tmp_path).left_out == {}
    assert rehearse(tmp_path) == 1
    assert read(tmp_path).left_out["bad"] == "failed before: --retry runs it once more"
    assert "exit status 3" in str(read(tmp_path).last_runs["bad"].reason)
    assert count_runs(tmp_path, "good") == 1, "a failure ends nothing else"
    rehearse(tmp_path, "--retry")
    rehearse(tmp_path, "--retry")
    assert [run.folder for run in read(tmp_path).runs if run.step == "bad"] == ["steps/bad", "steps/bad-2"]


@pytest.mark.slow
def test_step_that_hangs_is_ended_with_all_that_it_started(
    use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(make_step("hangs", code=HANG), make_step("next"))
    monkeypatch.setattr(runner, "REHEARSAL_LIMIT_S", 10.0)
    assert rehearse(tmp_path) == 1
    assert_gone(int((tmp_path / "steps" / "hangs" / "child").read_text()))
    assert [run.outcome for run in read(tmp_path).runs] == ["timed out", "held"]


@pytest.mark.slow
def test_budget_that_ends_is_no_failure(use: Callable[..., None], tmp_path: Path) -> None:
    use(make_step("hangs", code=HANG), make_step("next"))
    assert rehearse(tmp_path, "--budget-min", "0.15") == 0
    result = read(tmp_path)
    assert [(run.outcome, run.reason) for run in result.runs] == [("stopped", "the budget ended")]
    assert result.left_out == {"next": "the budget ended"}
    assert "the budget ended" in (tmp_path / "campaign.md").read_text()


@pytest.mark.slow
def test_interruption_keeps_all_and_the_same_command_continues(
    use: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(make_step("first"), make_step("hangs", code=HANG), make_step("last"))
    child = tmp_path / "steps" / "hangs" / "child"

    def interrupt() -> None:
        wait_for(child)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert rehearse(tmp_path) == 130
    thread.join()
    assert_gone(int(child.read_text()))
    result = read(tmp_path)
    assert [run.outcome for run in result.runs] == ["held", "stopped"]
    assert result.interrupted
    use(make_step("first"), make_step("hangs"), make_step("last"))
    assert rehearse(tmp_path) == 0
    last = read(tmp_path).last_runs
    assert {name: run.outcome for name, run in last.items()} == {"first": "held", "hangs": "held", "last": "held"}
    assert last["hangs"].folder == "steps/hangs", "a step that was stopped continues where it was"
    assert count_runs(tmp_path, "first") == 1


def test_another_machine_begins_a_stopped_step_afresh() -> None:
    step, here = make_step("a"), {"device": "H100", "commit": "c"}
    stopped = StepRun(
        **here,
        step="a",
        outcome="stopped",
        status=None,
        rehearsed=False,
        started="",
        wall_s=1.0,
        estimate_s=1,
        command=[],
        folder="steps/a",
        schema=None,
        figures=[],
        reason=None,
    )
    environment = runner.Environment(date="", command="", cpu="H100", git_commit="c")
    assert runner.choose_folder(step, [stopped], {"steps/a"}, environment) == "a"
    other = runner.Environment(date="", command="", cpu="H200", git_commit="c")
    assert runner.choose_folder(step, [stopped], {"steps/a"}, other) == "a-2"


def test_step_without_its_result_file_has_failed(use: Callable[..., None], tmp_path: Path) -> None:
    use(make_step("a", result="ab.json"))
    assert rehearse(tmp_path) == 1
    assert read(tmp_path).runs[0].reason == "ab.json: expected a result file, got No such file or directory"


def test_page_says_what_was_expected_and_what_was_left_out(use: Callable[..., None], tmp_path: Path) -> None:
    use(
        make_step("a", expected="all | well"),
        make_step("b", rehearsal=(), expected="later"),
        make_step("c", needs=("x/y",)),
    )
    assert rehearse(tmp_path) == 0
    page = (tmp_path / "campaign.md").read_text()
    assert str(tmp_path) not in page.partition("## Where and how")[0], "a page names no folder of this machine"
    assert "- expected: all | well\n- rehearsed: all well" in page
    assert "| b | later | nothing to rehearse on a CPU |" in page
    assert "| c | much | needs x/y, which only a checkout of the repository has |" in page


@pytest.mark.vllm
def test_rehearsal_of_kernels_and_one_engine(tmp_path: Path) -> None:
    """The real commands: the doctor, the MoE kernel, and an A/B whose two engines are eager and tiny."""
    assert rehearse(tmp_path, "--step", "doctor,moe-decode,toy-ab") == 0
    figures = {name: run.figures for name, run in read(tmp_path).last_runs.items()}
    assert figures["doctor"][0] == "all well"
    assert any(line.startswith("M 1, 0% pruned") for line in figures["moe-decode"])
    assert any(line.startswith("τ ") for line in figures["toy-ab"])
