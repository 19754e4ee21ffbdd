"""Folders of measurements: which command may go on with one, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.kit.run_dir import (
    NOTE,
    RunDirError,
    claim_folder,
    claim_work,
    hold_folder,
    hold_folders,
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
    with hold_folders(out, work, tmp_path / "a" / ".." / "work"):
        for place in (out, work):
            with pytest.raises(RunDirError, match="expected to write alone, got another run at it; wait for its end"):
                hold_folder(place).__enter__()
        (out / "part").write_text("x")
    assert [path.name for path in out.iterdir()] == ["part"]
    assert not work.exists(), "nothing came into it"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirError, match="expected a folder, got a file in its place"):
        hold_folder(tmp_path / "file").__enter__()


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
