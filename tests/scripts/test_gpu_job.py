"""scripts/gpu_job.py: fetches, runs and packs, with a small project in the place of this one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from laguna_serve.scripts import gpu_job

DEADLINE_S = 60.0
SCRIPT = Path(gpu_job.__file__)
# Writes down its flags, as often as it ran; ends as it is bidden; waits for an interruption where there is "wait".
CAMPAIGN = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
(out / "checkpoints" / "model.safetensors").write_bytes(bytes(1000))
with (out / "campaign.jsonl").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
if "wait" in sys.argv:
    try:
        (out / "waiting").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        (out / "page").write_text("written last")
        sys.exit(130)
sys.exit(int("--short" in sys.argv))
"""
BOOTSTRAP = f"mkdir -p .venv/bin && ln -sf {sys.executable} .venv/bin/python"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder that looks like this project."""
    folder = tmp_path / "project"
    for name, text in (("bench/campaign.py", CAMPAIGN), ("scripts/bootstrap.sh", BOOTSTRAP), ("pyproject.toml", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(tmp_path: Path, source: Path | str, *flags: str) -> int:
    place = ["--work", str(tmp_path / "work"), "--archive", str(tmp_path / "results.tar.gz")]
    return gpu_job.main(["--source", str(source), *place, *flags])


def list_archive(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return {member.name for member in tar.getmembers()}


@pytest.mark.parametrize("kind", ["folder", "archive", "git"])
def test_project_is_had_run_and_packed(kind: str, project: Path, tmp_path: Path) -> None:
    source: Path | str = project
    flags: list[str] = []
    if kind == "archive":
        source = shutil.make_archive(str(tmp_path / "source"), "gztar", tmp_path, "project")
    if kind == "git":
        git = ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"], ["tag", "v1"]):
            subprocess.run([*git, *command], check=True)
        source, flags = f"file://{project}", ["--ref", "v1"]
    assert run(tmp_path, source, "--budget-min", "3", *flags, "--", "--part", "kernels") == 0
    assert list_archive(tmp_path / "results.tar.gz") == {"results", "results/campaign.jsonl"}
    line = (tmp_path / "work" / "results" / "campaign.jsonl").read_text()
    assert line.startswith("--budget-min 3.0 --out")
    assert line.endswith("--part kernels\n")


def test_status_is_the_campaigns_and_another_machine_continues(project: Path, tmp_path: Path) -> None:
    assert run(tmp_path, project, "--", "--short") == 1
    shutil.rmtree(tmp_path / "work")
    assert run(tmp_path, project, "--resume", str(tmp_path / "results.tar.gz")) == 0
    assert len((tmp_path / "work" / "results" / "campaign.jsonl").read_text().splitlines()) == 2


def test_results_that_are_there_are_kept_or_the_archive_is_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive may be older than the folder: a job that was killed has written steps and packed nothing."""
    archive, journal = tmp_path / "results.tar.gz", tmp_path / "work" / "results" / "campaign.jsonl"
    assert run(tmp_path, project) == 0
    shutil.copy(archive, tmp_path / "older.tar.gz")
    assert run(tmp_path, project) == 0
    assert run(tmp_path, project, "--resume", str(tmp_path / "older.tar.gz")) == 0
    assert len(journal.read_text().splitlines()) == 3
    assert "has all that" in capsys.readouterr().out
    journal.write_text("another campaign\n")
    before = archive.read_bytes()
    assert run(tmp_path, project, "--resume", str(tmp_path / "older.tar.gz")) == 2
    assert "got" in (said := capsys.readouterr().err)
    assert "with other steps; leave it out, or name another --work" in said
    assert journal.read_text() == "another campaign\n"
    assert archive.read_bytes() == before


@pytest.mark.parametrize("kind", ["none", "other"])
def test_what_cannot_be_resumed_is_said_before_anything_is_installed(
    kind: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "earlier.tar.gz"
    if kind == "other":
        shutil.make_archive(str(tmp_path / "earlier"), "gztar", tmp_path, "project")
    assert run(tmp_path, project, "--resume", str(archive)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (project / ".venv").exists()
    assert not (tmp_path / "work" / "project").exists()


def test_folder_of_the_archive_is_made_and_a_folder_in_its_place_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--source", str(project), "--work", str(tmp_path / "work"), "--archive"]
    assert gpu_job.main([*place, str(tmp_path / "deep" / "down" / "r.tar.gz")]) == 0
    assert "results/campaign.jsonl" in list_archive(tmp_path / "deep" / "down" / "r.tar.gz")
    before = (tmp_path / "work" / "results" / "campaign.jsonl").read_bytes()
    assert gpu_job.main([*place, str(tmp_path / "deep")]) == 2
    assert "--archive: expected a file" in capsys.readouterr().err
    assert (tmp_path / "work" / "results" / "campaign.jsonl").read_bytes() == before


def commit(project: Path, note: str, *more: list[str]) -> None:
    """One more commit of the project, which says so in a file."""
    git = ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e"]
    (project / "note").write_text(note)
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", note], *more):
        subprocess.run([*git, *command], check=True)


@pytest.mark.slow
def test_commit_is_the_one_that_the_address_has_now(project: Path, tmp_path: Path) -> None:
    note = tmp_path / "work" / "tree" / "note"
    commit(project, "first", ["tag", "v1"])
    for ref in (["--ref", "main"], []):
        for text in ("later", "last"):
            commit(project, f"{text}{ref}")
            assert run(tmp_path, f"file://{project}", *ref) == 0
            assert note.read_text() == f"{text}{ref}"
    assert run(tmp_path, f"file://{project}", "--ref", "v1") == 0
    assert note.read_text() == "first"
    other = tmp_path / "other"
    shutil.copytree(project, other)
    commit(other, "others")
    assert run(tmp_path, f"file://{other}", "--ref", "main") == 0
    assert note.read_text() == "others"


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("file://{project}", ["--ref", "nosuch"], "--ref: expected a branch, tag or commit of file://"),
        ("none.tar.gz", [], "--source: expected a folder, an archive or what Git can read, got none.tar.gz"),
    ],
)
def test_what_git_does_not_have_is_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, flags: list[str], message: str
) -> None:
    commit(project, "first")
    assert run(tmp_path, source.format(project=project), *flags) == 2
    assert message in capsys.readouterr().err


def test_another_project_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    assert run(tmp_path, tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert "--source: expected this project" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "results.tar.gz").exists()


def test_end_of_a_hosted_job_is_passed_on_and_leaves_an_archive(project: Path, tmp_path: Path) -> None:
    """As a file of its own, in a Python that has nothing of the project."""
    archive = tmp_path / "results.tar.gz"
    place = ["--work", str(tmp_path / "work"), "--archive", str(archive)]
    job = subprocess.Popen([sys.executable, "-I", str(SCRIPT), "--source", str(project), *place, "--", "wait"])
    deadline = time.monotonic() + DEADLINE_S
    while not (tmp_path / "work" / "results" / "waiting").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(DEADLINE_S) == 130
    assert "results/page" in list_archive(archive)


def test_script_names_what_it_needs() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.startswith("# /// script\n# requires-python")
    assert "import laguna_serve" not in text
    assert "from laguna_serve" not in text
