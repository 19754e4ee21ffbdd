"""A spare process becomes the next engine, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving_fakes import read_pids, wait_until_gone

from laguna_serve.serving.engine import Engine, EngineConfig, EngineError, spare
from laguna_serve.serving.engine.spare import SERVE, Spares

# The main process, its child, and the orphan in a session of its own.
MEMBERS = 3
pytestmark = pytest.mark.slow


@pytest.fixture
def spares(fake_vllm: Path) -> Iterator[Spares]:
    made = Spares()
    made.want(True)
    yield made
    made.close()


def start(target: Path, tmp_path: Path, spares: Spares, name: str = "log", **settings: bool) -> Engine:
    config = EngineConfig(model=str(target), **settings)
    return Engine(config, log_path=tmp_path / name, stop_grace_s=0.5, spares=spares)


def find_tree(spares: Spares) -> list[psutil.Process]:
    """The spare's supervisor and what is beneath it, once that is there."""
    assert spares._process is not None
    supervisor = psutil.Process(spares._process.pid)
    deadline = time.monotonic() + 20
    while not (below := supervisor.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [supervisor, *below]


def test_spare_becomes_the_next_engine(target: Path, tmp_path: Path, spares: Spares, fake_vllm: Path) -> None:
    with start(target, tmp_path, spares) as first:
        supervisor, server = find_tree(spares)
        second = start(target, tmp_path, spares, "second")
        with second:
            assert server.pid in second.pids()
            assert first.base_url != second.base_url
            assert "GET /health" in (tmp_path / "second").read_text()
            third = find_tree(spares)
            assert third[0].pid != supervisor.pid
        wait_until_gone([server.pid, supervisor.pid])
        assert first.pids()
    spares.close()
    wait_until_gone([*read_pids(fake_vllm, 2 * MEMBERS), *(process.pid for process in third)])


def test_death_of_an_engine_that_was_a_spare_is_described(target: Path, tmp_path: Path, spares: Spares) -> None:
    with start(target, tmp_path, spares):
        find_tree(spares)
    with start(target, tmp_path, spares, "second") as engine:
        os.kill(min(engine.pids()), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not engine.is_dead() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(EngineError, match="SIGKILL"):
            engine.check()


@pytest.mark.parametrize("how", ["other variables", "killed", "no room", "not wanted"])
def test_engine_that_no_spare_fits_starts_by_itself(
    target: Path, tmp_path: Path, spares: Spares, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "no room":
        monkeypatch.setattr(spare, "ROOM_BYTES", 1 << 60)
    with start(target, tmp_path, spares):
        assert (spares._process is None) is (how == "no room")
        tree = [process.pid for process in find_tree(spares)] if spares._process is not None else []
    if how == "other variables":
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
    elif how == "killed":
        os.kill(tree[1], signal.SIGKILL)
        wait_until_gone(tree)
    elif how == "not wanted":
        spares.want(False)
        wait_until_gone(tree)
    with start(target, tmp_path, spares, "second") as engine:
        assert how == "not wanted" or not set(tree) & set(engine.pids())
        if how == "not wanted":
            assert spares._process is None
    wait_until_gone(tree)


def test_system_that_starts_no_spare_harms_no_engine(
    target: Path, tmp_path: Path, spares: Spares, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(spare.subprocess, "Popen", refuse)
        spares.prepare(SERVE, dict(os.environ))
    assert "Resource temporarily unavailable" in caplog.text
    with start(target, tmp_path, spares) as engine:
        assert engine.pids()


def test_engine_without_vllm_prepares_none(spares: Spares) -> None:
    spares.prepare([sys.executable, "-m", "laguna_serve.plugins.diffusion.server"], dict(os.environ))
    assert spares._process is None


OWNER = """
import os, sys, time
from laguna_serve.serving.engine.spare import SERVE, Spares
spares = Spares()
spares.want(True)
spares.prepare(SERVE, os.environ)
print(spares._process.pid, flush=True)
time.sleep(60)
"""


def test_spare_ends_with_whoever_made_it(fake_vllm: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        supervisor = psutil.Process(int(owner.stdout.readline()))
        deadline = time.monotonic() + 20
        while not (below := supervisor.children(recursive=True)) and time.monotonic() < deadline:
            time.sleep(0.02)
        owner.kill()
    wait_until_gone([supervisor.pid, *(process.pid for process in below)])
