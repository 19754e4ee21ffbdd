"""Folders of measurements: which command may go on with one, and what it leaves alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from laguna_serve.serving.kit import run_dir
from laguna_serve.serving.kit.run_dir import (
    NOTE,
    RunDirError,
    claim_folder,
    claim_work,
    hold_folder,
    hold_folders,
    hold_out,
    require_removable,
)


def test_only_the_same_measurement_goes_on(tmp_path: Path) -> None:
    claim_folder(tmp_path / "a" / "out", {"model": "m"})
    claim_folder(tmp_path / "a" / "out", {"model": "m"})
    with pytest.raises(RunDirError, match="another one's; choose another --out"):
        claim_folder(tmp_path / "a" / "out", {"model": "n"})


def test_the_note_is_not_written_again(tmp_path: Path) -> None:
    """A disk that is full by then would cut it off, and with it what was measured."""
    claim_folder(tmp_path, {"model": "m"})
    before = (tmp_path / NOTE).stat()
    claim_folder(tmp_path, {"model": "m"})
    after = (tmp_path / NOTE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == [NOTE]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_its_place_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirError, match="expected a folder, got a file in its place"):
        claim_folder(tmp_path / place, {})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_removed_holds_nothing_of_others(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for _ in range(2):  # the second time it has a note, and whatever the command left
        claim_work(work, out, {"steps": 1})
        (work / "a.state").write_text("x")
    with pytest.raises(RunDirError, match="another one's"):
        claim_work(work, out, {"steps": 2})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(RunDirError, match=r"--work .*: expected an empty folder .*, got one with other files"):
        claim_work(mine, out, {"steps": 1})
    with pytest.raises(RunDirError, match="got one with other files"):
        require_removable(mine, "recipe.json")
    for place in (out, tmp_path):
        with pytest.raises(RunDirError, match="got one with --out in it"):
            claim_work(place, out, {"steps": 1})
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    out, work = tmp_path / "a" / "out", tmp_path / "work"
    second = rf"expected to write alone, got another run at it \(process {os.getpid()}\); wait for its end"
    with hold_folders(out, work, tmp_path / "a" / ".." / "work"):
        for place in (out, work):
            with pytest.raises(RunDirError, match=second):
                hold_folder(place).__enter__()
        (out / "part").write_text("x")
    assert [path.name for path in out.iterdir()] == ["part"]
    assert not work.exists(), "nothing came into it"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirError, match="expected a folder, got a file in its place"):
        hold_folder(tmp_path / "file").__enter__()


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with hold_folder(mine / "a" / "b"):
        assert (mine / "a" / "b").is_dir()
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize("locks", [None, "1: POSIX  ADVISORY  WRITE 1 08:01:2 0 EOF\n"])
def test_a_second_run_is_kept_out_where_nobody_says_which_the_first_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str | None
) -> None:
    """A system without Linux's list of locks, or a process of another container."""
    monkeypatch.setattr(run_dir, "LOCKS", tmp_path / "locks")
    if locks is not None:
        (tmp_path / "locks").write_text(locks)
    with hold_folder(tmp_path), pytest.raises(RunDirError, match="got another run at it; wait for its end"):
        hold_folder(tmp_path).__enter__()


@dataclass(frozen=True)
class Config:
    """What a function that measures is given."""

    out: Path | None


@hold_out
def measure(config: Config, inner: Sequence[Config] = ()) -> str:
    """Measure, and within it once more for each of the others."""
    return "".join(measure(other) for other in inner) + "measured"


def test_a_function_holds_the_folder_of_its_configuration(tmp_path: Path) -> None:
    config = Config(tmp_path / "out")
    assert measure(config, [Config(None), Config(tmp_path / "other")]) == "measured" * 3
    assert measure(Config(None)) == "measured"
    with pytest.raises(RunDirError, match=r"got another run at it"):
        measure(config, [config])
    assert measure(config) == "measured"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirError, match=r"^--out .*: expected a folder, got the file"):
        measure(Config(tmp_path / "file"))


def test_a_folder_that_was_begun_and_has_nothing_is_taken_by_whoever_holds_it(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"model": "m"}, alone=True)
    with pytest.raises(RunDirError, match="another one's"):
        claim_folder(tmp_path, {"model": "n"})
    claim_folder(tmp_path, {"model": "n"}, alone=True)
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "part").write_text("x")
    claim_folder(tmp_path, {"model": "n"}, alone=True)
    with pytest.raises(RunDirError, match="another one's"):
        claim_folder(tmp_path, {"model": "m"}, alone=True)
