"""laguna serve when its engine dies: the cause is reported, requests wait for the next, streams end in an error."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import TIMEOUT_S, post, read_addresses, read_pids, read_url, serving, wait_until_gone

from laguna_serve.serving.cli import main
from laguna_serve.serving.engine import find_port
from laguna_serve.serving.engine.keeper import RestartPolicy
from laguna_serve.serving.service import service

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
# The main process, its child, the orphan in a session of its own, and the core.
MEMBERS = 4
DEATHS = {
    "worker": "got exit status 1: (EngineCore pid=2) ERROR|Worker proc VllmWorker-0 died unexpectedly (exit code: -9)",
    "kill": "got signal 9 (SIGKILL): killed without a word in its log",
    "segv": "got signal 11 (SIGSEGV): Segmentation fault in end (",
    "exit": "got exit status 0: it ended by itself; its last line: POST /v1/die/exit",
    "core": "got its core ended: killed without a word in its log",
}


class Stream:
    """A streaming client that reads to the end in a thread."""

    def __init__(self, url: str, path: str = COMPLETIONS, body: Any = None) -> None:
        self.data = b""
        self._begun = threading.Event()
        data = json.dumps(body or {"stream": True}).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        self._answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._begun.wait(30)

    def _read(self) -> None:
        while line := self._answer.readline():
            self.data += line
            self._begun.set()

    def read_end(self) -> list[str]:
        """Its events, once it has ended."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the stream goes on"
        return self.data.decode().split("\n\n")[:-1]


def read_until(server: subprocess.Popen[str], mark: str) -> list[str]:
    """The lines of stderr up to one that holds the mark."""
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line.rstrip())
        if mark in line:
            return lines
    raise AssertionError(f"expected {mark!r}, got {lines}")


def wait_until_refused(port: int) -> None:
    """Wait until nobody listens on the port.

    What reaches an engine that dies is in flight; of one that is gone the gateway may not know yet.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
        except ConnectionRefusedError:
            return
        except OSError:
            continue
    raise AssertionError(f"expected nobody at port {port}")


def read_status(admin: str) -> Any:
    with urllib.request.urlopen(f"{admin}/admin/status", timeout=30) as answer:
        return json.load(answer)


def wait_until_queued(admin: str, count: int) -> None:
    """Wait until that many requests wait: one that is not yet in when the server ends meets nobody."""
    deadline = time.monotonic() + 30
    while read_status(admin)["models"]["teacher"]["queued"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(server: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[dict[str, Any], str]:
    """The last line of stdout as an object, and the rest of stderr."""
    server.send_signal(number)
    out, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
    assert "Traceback" not in err
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize("how", DEATHS)
def test_engine_is_started_again_and_requests_wait(fake_vllm: Path, target: Path, tmp_path: Path, how: str) -> None:
    with serving(target, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        url = read_url(server)
        first = post(url, COMPLETIONS)
        assert first["start"] == 1
        stream = Stream(url)
        post(url, f"/v1/die/{how}")
        wait_until_refused(int(first["argv"][first["argv"].index("--port") + 1]))
        waiting = [pool.submit(post, url, COMPLETIONS) for _ in range(8)]
        told = read_until(server, "serving again, restart 1")
        assert [request.result().get("start", request.result()) for request in waiting] == [2] * 8
        assert post(url, COMPLETIONS)["start"] == 2
        *events, error, done = stream.read_end()
        assert set(events) == {'data: {"choices": [{"text": "start 1"}]}'}, "a half of another engine's answer"
        assert "error" in json.loads(error.removeprefix("data: "))
        assert done == "data: [DONE]"
        result, _ = stop(server)
    died = [line for line in told if "starting it again in 1 s (failure 1 of 5 in a row)" in line]
    assert len(died) == 1
    assert DEATHS[how].rpartition("|")[2] in died[0]
    assert (result["outcome"], result["restarts"], result["url"]) == ("stopped", 1, url)
    assert [DEATHS[how].rpartition("|")[2] in death["cause"] for death in result["deaths"]] == [True]
    assert f"POST /v1/die/{how}" in (tmp_path / "log.1").read_text()
    assert "POST /v1/die" not in (tmp_path / "log").read_text()
    wait_until_gone(read_pids(fake_vllm, 2 * MEMBERS), timeout_s=0)


@pytest.mark.parametrize(
    ("path", "mark"),
    [("/v1/chat/completions", "data: [DONE]"), ("/v1/messages", "event: error")],
    ids=["chat", "messages"],
)
def test_streams_end_in_their_own_form(fake_vllm: Path, target: Path, tmp_path: Path, path: str, mark: str) -> None:
    with serving(target, tmp_path) as server:
        url = read_url(server)
        stream = Stream(url, path)
        post(url, "/v1/die/kill")
        assert mark in stream.read_end()[-1]
        stop(server)


def test_bare_engine_is_started_again_at_its_port(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--no-gateway") as server:
        url = read_url(server, gateway=False)
        assert post(url, COMPLETIONS)["start"] == 1
        post(url, "/v1/die/kill")
        read_until(server, "serving again, restart 1")
        assert post(url, COMPLETIONS)["start"] == 2
        assert stop(server)[0]["restarts"] == 1


def test_port_that_is_taken_meanwhile_is_waited_for(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--no-gateway") as server:
        url = read_url(server, gateway=False)
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            post(url, "/v1/die/kill")
            deadline = time.monotonic() + 30
            while True:  # until the dead engine's listener is gone
                try:
                    taken.bind((host, int(port)))
                    break
                except OSError:
                    assert time.monotonic() < deadline
            taken.listen()
            lines = read_until(server, "failure 2 of 5 in a row")
        assert f"port: expected {host}:{port} to be free" in lines[-1]
        read_until(server, "serving again, restart 1")
        assert stop(server)[0]["restarts"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["waiting", "starting"])
def test_interrupt_while_it_is_away(
    fake_vllm: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "serve,hang")
    with serving(target, tmp_path) as server, ThreadPoolExecutor(4) as pool:
        url, admin = read_addresses(server)
        post(url, "/v1/die/kill")
        read_until(server, "starting it again in 1 s")
        waiting = [pool.submit(post, url, COMPLETIONS) for _ in range(4)]
        wait_until_queued(admin, 4)
        if when == "starting":
            read_until(server, "loading weights")
        result, err = stop(server, number)
        for request in waiting:
            assert request.result()["status"] == 503
    assert result["outcome"] == "stopped"
    assert result["restarts"] == 0
    assert len(result["deaths"]) == 1
    own = [line for line in err.splitlines() if " gateway: " not in line and not line.startswith("engine teacher: ")]
    assert own == []
    wait_until_gone(read_pids(fake_vllm, MEMBERS), timeout_s=0)


def run_inside(monkeypatch: pytest.MonkeyPatch, arguments: list[str], act: Callable[[str], Any]) -> tuple[int, Any]:
    """The command in this process, without waits between starts; `act` gets its URL in a thread."""
    monkeypatch.setattr(service, "RestartPolicy", lambda: RestartPolicy(first_s=0.0))
    monkeypatch.setattr(service, "interrupt_on_signals", lambda *, hangup: None)
    port = find_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    done: Future[Any] = Future()

    def work() -> None:
        deadline = time.monotonic() + 60
        while post(url, COMPLETIONS) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        done.set_result(act(url))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    status = main([*arguments, "--port", str(port)])
    return status, done.result(60)


@pytest.mark.parametrize("behaviour", ["serve,die", "serve,serve,die"])
def test_engine_that_fails_again_and_again_is_given_up(
    fake_vllm: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    behaviour: str,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", behaviour)

    def kill_all(url: str) -> Any:
        for _ in range(behaviour.count("serve")):
            post(url, COMPLETIONS)
            post(url, "/v1/die/kill")
        return post(url, COMPLETIONS)

    status, answer = run_inside(monkeypatch, ["serve", str(target), "--log", str(tmp_path / "log")], kill_all)
    out, err = capfd.readouterr()
    assert status == 1
    assert answer is None or answer["status"] in (502, 503)
    last = [line for line in err.splitlines() if line.startswith("laguna: error: ")]
    assert len(last) == 1
    assert "RuntimeError: start (0) + length (640) exceeds 512.; see " in last[0]
    assert last[0].endswith("; given up after 5 failures in a row, each within 300 s of its start")
    result = json.loads(out.splitlines()[-1])
    assert (result["outcome"], result["restarts"], len(result["deaths"])) == ("died", behaviour.count("serve") - 1, 5)
    wait_until_gone(read_pids(fake_vllm, 1), timeout_s=0)


def test_waits_in_the_queue_are_bounded(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "serve,hang")
    file = tmp_path / "gateway.toml"
    file.write_text("[limits]\nmax_queued = 2\nqueue_timeout_s = 1.5\n")
    with serving(target, tmp_path, "--gateway-config", str(file)) as server, ThreadPoolExecutor(8) as pool:
        url = read_url(server)
        post(url, "/v1/die/kill")
        read_until(server, "starting it again in 1 s")
        found = [pool.submit(post, url, COMPLETIONS) for _ in range(8)]
        codes = sorted(request.result()["status"] for request in found)
        assert codes == [429] * 6 + [503] * 2
        stop(server)


def test_status_page_tells_restarts(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path) as server:
        url, admin = read_addresses(server)
        post(url, "/v1/die/kill")
        read_until(server, "serving again, restart 1")
        status = read_status(admin)
        with urllib.request.urlopen(admin, timeout=30) as answer:
            page = answer.read().decode()
        stop(server)
    engine = status["models"]["teacher"]["upstreams"][0]
    assert (engine["state"], engine["restarts"]) == ("up", 1)
    assert "killed without a word" in engine["deaths"][0]["cause"]
    assert "killed without a word" in page
