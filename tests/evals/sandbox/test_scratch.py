"""The folder of programs without a file system of their own: how much it takes, and that it goes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from laguna_serve.evals.sandbox import scratch
from laguna_serve.evals.sandbox.scratch import make_scratch, remove_tree

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


@contextlib.contextmanager
def inside(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_tree_deeper_than_any_path_goes(folder: Path) -> None:
    with inside(folder):
        for _ in range(3000):
            os.mkdir("x" * 255)
            os.chdir("x" * 255)
        Path("file").touch()
    remove_tree(str(folder))
    assert not folder.exists()


def test_names_of_the_clean_up_itself_may_be_taken(folder: Path) -> None:
    for number in range(50):
        (folder / f"moved-{number}" / f"moved-{number + 1}" / "moved-0").mkdir(parents=True)
        (folder / f"moved-{number}" / "moved-0.txt").touch()
    remove_tree(str(folder))
    assert not folder.exists()


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "within").mkdir(parents=True)
    (kept / "file").write_text("x")
    (folder / "link").symlink_to(kept)
    (folder / "below").mkdir()
    (folder / "below" / "link").symlink_to(kept)
    (folder / "hard").hardlink_to(kept / "file")
    kept.chmod(0o755)
    remove_tree(str(folder))
    assert not folder.exists()
    assert (kept / "file").read_text() == "x"
    assert sorted(os.listdir(kept)) == ["file", "within"]
    assert kept.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600])
def test_folders_that_nobody_may_enter_go(folder: Path, mode: int) -> None:
    for path in ("closed", "closed/within", "closed/within/deeper"):
        (folder / path).mkdir()
        (folder / path / "file").touch()
    for path in ("closed/within/deeper", "closed/within", "closed", "."):
        (folder / path).chmod(mode)
    remove_tree(str(folder))
    assert not folder.exists()


def test_other_things_go(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    os.symlink("loop", folder / "loop")
    (folder / os.fsdecode(b"\xff\n\x1b[31m")).touch()
    (folder / ("n" * 255)).mkdir()
    remove_tree(str(folder))
    assert not folder.exists()


def test_folder_is_gone_whatever_happens() -> None:
    def fail() -> None:
        with make_scratch(MIB) as made:
            Path(made.path, "file").touch()
            raise KeyError(made.path)

    with pytest.raises(KeyError) as raised:
        fail()
    assert not os.path.exists(raised.value.args[0])


def test_excess_is_found() -> None:
    with make_scratch(MIB) as made:
        path = Path(made.path)
        assert made.find_excess() is None
        (path / "a" / "b").mkdir(parents=True)
        (path / "a" / "b" / "file").write_bytes(bytes(MIB // 2))
        (path / "sparse").touch()
        os.truncate(path / "sparse", 1 << 40)
        assert made.find_excess() is None, "a hole takes no space"
        (path / "a" / "more").write_bytes(bytes(MIB))
        assert "expected at most 1048576 bytes" in str(made.find_excess())


@pytest.mark.slow
def test_names_and_depth_are_bounded() -> None:
    with make_scratch(MIB) as made, inside(Path(made.path)):
        for number in range(scratch.MAX_ENTRIES + 1):
            os.mkdir(str(number))
        assert f"at most {scratch.MAX_ENTRIES} files and folders" in str(made.find_excess())
    with make_scratch(MIB) as made, inside(Path(made.path)):
        for _ in range(scratch.MAX_DEPTH + 1):
            os.mkdir("x")
            os.chdir("x")
        assert f"at most {scratch.MAX_DEPTH} deep" in str(made.find_excess())


def test_files_without_a_name_are_noticed_where_the_folder_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1 << 40
    monkeypatch.setattr(scratch, "_measure_free", lambda _: free)
    with make_scratch(MIB) as made:
        free -= scratch.UNSEEN_SHARE * 2 * MIB
        assert made.find_excess() is None, "others write, too"
        with open(Path(made.path, "file"), "wb"):
            os.unlink(Path(made.path, "file"))
        assert "expected at most 1048576 bytes in files, got 2097152" in str(made.find_excess())


def test_measuring_bears_a_folder_that_changes() -> None:
    stop = threading.Event()

    def churn(path: Path) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                (path / "a" / "b").mkdir(parents=True)
                (path / "a").rename(path / "c")
                (path / "c" / "b").rmdir()
                (path / "c").rmdir()
                (path / "a").symlink_to("/")
                (path / "a").unlink()

    with make_scratch(MIB) as made:
        before = len(os.listdir("/proc/self/fd"))
        thread = threading.Thread(target=churn, args=(Path(made.path),))
        thread.start()
        try:
            assert {made.find_excess() for _ in range(500)} == {None}
        finally:
            stop.set()
            thread.join()
        assert len(os.listdir("/proc/self/fd")) == before
