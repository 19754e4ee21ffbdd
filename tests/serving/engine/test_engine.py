"""Start, failure and end of an engine, with a mock of vLLM whose children only die of SIGKILL."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving_fakes import TARGET, MakeCheckpoint, read_pids, wait_until_gone

from laguna_serve.serving.engine import Engine, EngineConfig, EngineError

# The main process, its child, and the orphan in a session of its own.
MEMBERS = 3
STOP_GRACE_S = 0.5

# A launcher that is killed from outside.
LAUNCHER = """
import signal, sys, time
from pathlib import Path
from laguna_serve.serving.engine import Engine, EngineConfig
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
with Engine(EngineConfig(model=sys.argv[1]), log_path=Path(sys.argv[2]), stop_grace_s=0.5) as engine:
    print(engine._supervisor.pid, flush=True)
    time.sleep(60)
"""


def start(target: Path, tmp_path: Path, config: EngineConfig | None = None, ready_timeout_s: float = 60.0) -> Engine:
    return Engine(
        config or EngineConfig(model=str(target)),
        log_path=tmp_path / "logs" / "engine.log",
        ready_timeout_s=ready_timeout_s,
        stop_grace_s=STOP_GRACE_S,
    )


def post_die(engine: Engine) -> None:
    connection = http.client.HTTPConnection(engine.base_url.removeprefix("http://"), timeout=5)
    with contextlib.suppress(http.client.HTTPException, OSError):
        connection.request("POST", "/die")
        connection.getresponse()
    connection.close()


def fail_inside(engine: Engine, fake_vllm: Path) -> None:
    with engine:
        read_pids(fake_vllm, MEMBERS)
        raise ZeroDivisionError


def check_until_dead(engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        engine.check()
        time.sleep(0.02)


@pytest.mark.slow
def test_engine_serves_and_leaves_nothing(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    engine = Engine(EngineConfig(model=str(target)), log_path=tmp_path / "log", stop_grace_s=0.5, announce=lines.append)
    with engine:
        members = read_pids(fake_vllm, MEMBERS)
        assert set(members) <= set(engine.pids())
        assert engine.base_url == f"http://127.0.0.1:{engine.command[engine.command.index('--port') + 1]}"
        engine.check()
    wait_until_gone(members, timeout_s=0)
    assert engine.pids() == []
    assert lines[0].startswith("engine teacher: importing vLLM")
    assert "ready at http://127.0.0.1:" in lines[-1]
    engine.stop()


@pytest.mark.slow
def test_exception_reaps(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_inside(start(target, tmp_path), fake_vllm)
    wait_until_gone(read_pids(fake_vllm, MEMBERS), timeout_s=0)


@pytest.mark.parametrize(
    ("arguments", "grace_s"),
    [
        ((), STOP_GRACE_S),
        (("--shutdown-timeout", "60"), 60 + STOP_GRACE_S),
        (("--shutdown_timeout=7",), 7 + STOP_GRACE_S),
        (("--shutdown-timeout", "soon"), STOP_GRACE_S),
        (("--shutdown-timeout",), STOP_GRACE_S),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_engine_that_may_finish_requests_is_given_the_time(
    target: Path, tmp_path: Path, arguments: tuple[str, ...], grace_s: float
) -> None:
    """It was killed after the grace of those that cut requests off, in the middle of an answer."""
    assert start(target, tmp_path, EngineConfig(model=str(target), extra_args=arguments)).stop_grace_s == grace_s


@pytest.mark.slow
def test_engine_that_ignores_sigterm_is_killed(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    with start(target, tmp_path):
        members = read_pids(fake_vllm, MEMBERS)
    wait_until_gone(members, timeout_s=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_killed_launcher_leaves_nothing(fake_vllm: Path, target: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(target), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout is not None
        supervisor = int(launcher.stdout.readline())
        members = read_pids(fake_vllm, MEMBERS)
        os.kill(launcher.pid, number)
        launcher.wait(10)
        wait_until_gone([supervisor, *members])


@pytest.mark.slow
def test_launcher_killed_during_start_leaves_nothing(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    command = [sys.executable, "-c", LAUNCHER, str(target), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        members = read_pids(fake_vllm, MEMBERS)
        launcher.kill()
    wait_until_gone(members)


@pytest.mark.slow
def test_killed_supervisor_leaves_nothing(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with start(target, tmp_path) as engine:
        members = read_pids(fake_vllm, MEMBERS)
        supervisor = psutil.Process(members[0]).parent()
        assert supervisor is not None
        supervisor.kill()
        # The kernel takes the main process down with it; the others are ours to end.
        wait_until_gone(members[:1])
        with pytest.raises(EngineError, match=r"got signal 9 \(SIGKILL\)"):
            check_until_dead(engine)
    wait_until_gone(members)


@pytest.mark.slow
def test_death_at_start_quotes_the_root_cause(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    with pytest.raises(EngineError) as caught, start(target, tmp_path):
        pass
    log = tmp_path / "logs" / "engine.log"
    cause = "RuntimeError: start (0) + length (640) exceeds 512."
    assert str(caught.value) == f"engine teacher: expected it to run, got exit status 1: {cause}; see {log}"
    wait_until_gone(read_pids(fake_vllm, 1), timeout_s=0)


@pytest.mark.slow
def test_death_while_serving_is_told_by_check(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with start(target, tmp_path) as engine:
        members = read_pids(fake_vllm, MEMBERS)
        post_die(engine)
        wait_until_gone(members)
        with pytest.raises(EngineError, match=r"Worker proc VllmWorker-0 died unexpectedly \(exit code: -9\)"):
            check_until_dead(engine)


@pytest.mark.slow
def test_silent_engine_times_out(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    # On a busy machine the mock may not have come further than its imports.
    message = "expected an answer within 3 s, got none while (importing vLLM|loading weights); see "
    with pytest.raises(EngineError, match=message), start(target, tmp_path, ready_timeout_s=3.0):
        pass
    wait_until_gone(read_pids(fake_vllm, 0), timeout_s=0)


def test_port_is_nobody_elses_while_the_engine_starts(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found free; until vLLM has it seconds pass."""
    start_process, taken = subprocess.Popen, []

    def start_late(command: list[str], **named: Any) -> subprocess.Popen[bytes]:
        port = int(command[command.index("--port") + 1])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        taken.append(port)
        return start_process(command, **named)

    monkeypatch.setattr("laguna_serve.serving.engine.engine.subprocess.Popen", start_late)
    with start(target, tmp_path) as engine:
        assert engine.base_url.endswith(f":{taken[0]}")
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken[0]))


def test_taken_port_fails_before_start(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = EngineConfig(model=str(target), port=port)
        with pytest.raises(EngineError, match=f"expected 127.0.0.1:{port} to be free"), start(target, tmp_path, config):
            pass
    assert not fake_vllm.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(model="/no/such/model"), "expected an existing folder or a hub id"),
        (EngineConfig(model="TARGET", gamma=2), "gamma: expected a draft beside it"),
        (EngineConfig(model="TARGET", draft="TARGET"), "expected a DFlash drafter, got LagunaForCausalLM"),
        (EngineConfig(model="TARGET", port=70000), "port: expected 1 to 65535, got 70000"),
        (EngineConfig(model="TARGET", host="203.0.113.1"), "port: expected 203.0.113.1:"),
        (EngineConfig(model="TARGET", kv_cache_gib=10_000.0), r"expected .* free .*10000\.0 GiB KV cache"),
    ],
    ids=["missing-path", "gamma-alone", "target-as-draft", "port-range", "foreign-host", "memory"],
)
def test_bad_input_fails_before_start_in_one_line(
    fake_vllm: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, config: EngineConfig, message: str
) -> None:
    target = str(make_checkpoint("teacher", TARGET))
    fields = {name: getattr(config, name) for name in ("host", "port", "gamma", "kv_cache_gib")}
    model, draft = (target if name == "TARGET" else name for name in (config.model, config.draft))
    assert model is not None
    with (
        pytest.raises(EngineError, match=message) as caught,
        start(Path(model), tmp_path, EngineConfig(model=model, draft=draft, **fields)),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert not fake_vllm.exists()


def test_engine_that_was_not_started_is_not_running(target: Path, tmp_path: Path) -> None:
    engine = start(target, tmp_path)
    assert engine.pids() == []
    with pytest.raises(EngineError, match="got one that was not started"):
        engine.check()
