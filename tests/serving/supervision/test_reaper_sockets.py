"""vLLM's sockets lie in a folder of their own, which goes with the engine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from laguna_serve.serving.supervision.reaper import SOCKETS, keep_sockets


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv(SOCKETS, "")  # so that it is put back afterwards
    monkeypatch.delenv(SOCKETS)


def test_folder_goes_with_what_is_in_it() -> None:
    with keep_sockets():
        folder = Path(os.environ[SOCKETS])
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "5c4cf4b3-ffcc-4a4e-9a9d-4a1f3f9a0e75").touch()
    assert not folder.exists()


def test_folder_that_is_set_stays_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    with keep_sockets():
        assert os.environ[SOCKETS] == str(tmp_path)
    assert tmp_path.exists()


@pytest.mark.parametrize("name", ["x" * 90, "not/there"])
def test_where_none_can_be_vllm_has_its_own(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paths of sockets are short, and disks are full."""
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with keep_sockets():
        assert SOCKETS not in os.environ
