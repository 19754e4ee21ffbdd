"""The log under a full disk, a deletion and months of lines, and the engine that goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from serving_fakes import post

from laguna_serve.serving.engine import Engine, EngineConfig, EngineError
from laguna_serve.serving.supervision.default_logs import drop_oldest
from laguna_serve.serving.supervision.log_file import LogWriter, rotate


@pytest.fixture
def told() -> list[str]:
    return []


def test_lines_are_appended(tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "new" / "log"
    writer = LogWriter(path, told.append)
    writer.write(b"one\n")
    writer.write(b"two\n")
    writer.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert told == []


@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_a_deleted_log_is_begun_again(tmp_path: Path, told: list[str], whole: bool) -> None:
    path = tmp_path / "logs" / "log"
    writer = LogWriter(path, told.append)
    writer.write(b"one\n")
    shutil.rmtree(path.parent) if whole else path.unlink()
    writer.write(b"two\n")
    assert path.read_bytes() == b"two\n"
    path.rename(tmp_path / "moved")  # as logrotate does
    writer.write(b"three\n")
    assert path.read_bytes() == b"three\n"
    assert told == []


def test_a_full_disk_is_told_once_and_forgiven(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, full = tmp_path / "log", True
    write = os.write

    def fill(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fill)
    writer = LogWriter(path, told.append)
    writer.write(b"12345")
    writer.write(b"678")
    expected = "expected to append to it, got No space left on device; the engine goes on, and its lines are lost until"
    assert told == [f"log {path}: {expected} there is room"]
    full = False
    writer.write(b"words\n")
    assert told[1:] == [f"log {path}: written again, 8 bytes were lost"]
    assert path.read_bytes() == b"[8 bytes of this log were lost]\nwords\n"


def test_a_long_log_is_moved_aside(tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, told.append, max_bytes=10)
    for number in range(9):
        writer.write(b"%d23456\n" % number)
    writer.close()
    names = sorted(found.name for found in tmp_path.iterdir())
    assert names == ["log", *(f"log.{number}" for number in range(1, 5))]
    assert path.read_bytes() == b"823456\n"
    assert (tmp_path / "log.1").read_bytes() == b"623456\n723456\n"
    assert told == []


def test_logs_named_by_a_process_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(6):
        for name in (f"ray-{number}.log", f"ray-{number}.log.1", f"serve-{number}.log"):
            (tmp_path / name).write_text("")
            os.utime(tmp_path / name, (0, number))
    os.utime(tmp_path / "ray-1.log", (0, 100))  # written to last
    drop_oldest(tmp_path, "ray-", 2)
    kept = {"ray-1.log", "ray-1.log.1", "ray-5.log", "ray-5.log.1"}
    assert {path.name for path in tmp_path.glob("ray-*")} == kept
    assert len(list(tmp_path.glob("serve-*"))) == 6
    drop_oldest(tmp_path / "none", "ray-")


def test_devices_are_not_moved() -> None:
    rotate(Path("/dev/null"))
    assert Path("/dev/null").exists()


def test_engine_serves_with_a_full_disk(fake_vllm: Path, target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """/dev/full refuses every write as a full disk does."""
    with Engine(EngineConfig(model=str(target)), log_path=Path("/dev/full"), stop_grace_s=0.5) as engine:
        for _ in range(3):
            assert post(engine.base_url, "/v1/completions")["start"] == 1
        engine.check()
    lines = [line for line in capfd.readouterr().err.splitlines() if "No space left on device" in line]
    assert len(lines) == 1
    assert lines[0].startswith("laguna: warning: log /dev/full: expected to append to it")


def test_a_log_that_cannot_be_written_is_refused(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "log", "File exists|Not a directory")):
        with (
            pytest.raises(EngineError, match=f"expected a file that can be written, got ({reason}); choose another"),
            Engine(EngineConfig(model=str(target)), log_path=path),
        ):
            pass
    assert not fake_vllm.exists()


def test_cause_is_read_from_a_log_that_was_deleted(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Engine(EngineConfig(model=str(target)), log_path=path, stop_grace_s=0.5) as engine:
        path.unlink()
        post(engine.base_url, "/v1/die")
        assert "Worker proc VllmWorker-0 died unexpectedly" in engine.describe_death()
