"""The gateway's file and command: what is refused, with which words; reload, port and signals of the real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateway_fakes import Upstream, wait_until

from laguna_serve.serving.cli import main
from laguna_serve.serving.gateway.config import ConfigError, load_config

GOOD = """
[server]
port = 0

[limits]
max_queued = 8

[[models]]
name = "laguna/xs.2"
affinity = "prefix"

[[models.upstreams]]
name = "a"
url = "http://127.0.0.1:8000/"
weight = 9

[[models.upstreams]]
name = "b"
url = "http://[::1]:8001"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return path


def test_good_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    (model,) = config.models
    assert [upstream.url for upstream in model.upstreams] == ["http://127.0.0.1:8000", "http://[::1]:8001"]
    assert (model.upstreams[0].weight, config.limits.max_queued, config.limits.queue_timeout_s) == (9, 8, 30)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_queued = 8", "max_queue = 8", "limits.max_queue: expected no such key"),
        ("max_queued = 8", "max_queued = -1", "limits.max_queued: expected at least 0, got -1"),
        ("max_queued = 8", 'max_queued = "8"', "limits.max_queued: expected an integer, got '8'"),
        ("port = 0", "port = 70000", "server.port: expected at most 65,535, got 70000"),
        ("port = 0", 'host = ""', "server.host: expected an address or a name, without spaces, got ''"),
        ("port = 0", r'host = "a\nb"', r"server.host: expected an address or a name, without spaces, got 'a\nb'"),
        (
            "[limits]",
            f'[traces]\nfile = "{"x" * 256}"\n[limits]',
            "traces.file: expected a file's name, without control",
        ),
        (
            "[limits]",
            '[access]\nusage_file = "a\\u0000"\n[limits]',
            "access.usage_file: expected a file's name, without",
        ),
        (
            "[limits]",
            '[traces]\nfile = "./same.db"\n[access]\nusage_file = "same.db"\n[limits]',
            "expected distinct files as traces.file and access.usage_file, got './same.db' for both",
        ),
        ('name = "laguna/xs.2"', "", "models.0.name: expected a value, got none"),
        ('"prefix"', '"luck"', "models.0.affinity: expected 'none', 'session' or 'prefix', got 'luck'"),
        ('name = "b"', 'name = "a"', "expected distinct names of upstreams, got 'a' twice"),
        (
            "http://127.0.0.1:8000/",
            "file:///etc/passwd",
            "expected http://host:port[/prefix], got 'file:///etc/passwd'",
        ),
        (
            "http://127.0.0.1:8000/",
            "http://u:p@h:1",
            "without user, password or query (api_key_file has a key), got 'http://***@h:1'",
        ),
        ("http://127.0.0.1:8000/", "http://a..b:1", "with the name of a host, of labels of 1 to 63 characters, got 'h"),
        ("http://127.0.0.1:8000/", f"http://{'a' * 64}:1", "with the name of a host, of labels of 1 to 63 characters"),
        ("http://127.0.0.1:8000/", "http://h:1/v1", "without /v1, with which requests begin, got 'http://h:1/v1'"),
        (
            "[[models]]",
            '[[models]]\nname = "own"\n[models.engine]\nmodel = "m"\ndraft = "d"\ngamma = 0\n[[models]]',
            "models.0.engine.gamma: expected at least 1, or 'max', 'auto' or 'adaptive', got 0; see",
        ),
        ("weight = 9", "weight = 0", "models.0.upstreams.0.weight: expected more than 0, got 0"),
        ("[server]", "[server", "expected TOML, got"),
        (GOOD, "", "models: expected a value, got none"),
        (
            GOOD,
            GOOD + '[[keys]]\nname = "k"\nsha256 = "secret"\n',
            "keys.0.sha256: expected the SHA-256 of a key, 64 hexadecimal digits",
        ),
    ],
)
def test_bad_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    assert main(["gateway", "--config", str(path), "--check"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "gateway.toml: " in err
    assert len(err.splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got No such file or directory; check the path, or begin with"):
        load_config(tmp_path / "none.toml")


def test_check_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--config", str(write(tmp_path, GOOD)), "--check"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["laguna/xs.2"]
    assert main(["gateway", "--upstream", "http://h:1", "--model", "m", "--check"]) == 0
    assert main(["gateway", "--check"]) == 2
    assert "--config or --upstream: expected one of them" in capsys.readouterr().err


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().split()[2]
        finally:
            server.kill()


def get(url: str) -> tuple[int, str | None]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.headers.get("x-upstream")
    except urllib.error.HTTPError as error:
        return error.code, None


@pytest.mark.slow
def test_sighup_without_a_file_stops_it_in_good_order() -> None:
    """Started with the signal's default, also where these tests run under nohup, which it would respect."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Upstream() as one, process("--upstream", one.url, "--port", "0") as (server, url):
        signal.signal(signal.SIGHUP, before)
        assert get(f"{url}/health")[0] == 200
        server.send_signal(signal.SIGHUP)
        out, err = server.communicate(timeout=10)
        assert (server.returncode, json.loads(out.splitlines()[-1])["outcome"]) == (0, "stopped")
        assert err.endswith("stopping: no new requests, 0 in flight\n")


@pytest.mark.slow
def test_process_reloads_on_sighup_and_stops_on_sigterm(tmp_path: Path) -> None:
    with Upstream() as one, Upstream() as two:
        text = '[server]\nport = 0\n[[models]]\nname = "m"\n[[models.upstreams]]\nname = "{}"\nurl = "{}"\n'
        path = write(tmp_path, text.format("one", one.url))
        with process("--config", str(path)) as (server, url):
            assert get(f"{url}/v1/models") == (200, "one")
            path.write_text(text.format("two", two.url))
            server.send_signal(signal.SIGHUP)
            assert server.stderr is not None
            assert " engine one removed" in server.stderr.readline()
            assert server.stderr.readline().endswith(" INFO gateway: configuration read again\n")
            assert get(f"{url}/v1/models") == (200, "two")
            path.write_text("models = 3")
            server.send_signal(signal.SIGHUP)
            assert "going on as before" in server.stderr.readline()
            assert get(f"{url}/v1/models") == (200, "two")
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=10)
            assert server.returncode == 0
            assert " INFO gateway: stopping: no new requests, " in err
            assert json.loads(out.splitlines()[-1])["outcome"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "/dev/zero"], "/dev/zero: expected a configuration of at most 16,777,216 characters, got more"),
        (["--upstream", "http://127.0.0.1:1", "--model", ""], "models.0.name: expected 1 to 512 characters"),
    ],
    ids=["device", "no-name"],
)
def test_flags_that_name_nothing_are_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["gateway", *flags, "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_before_it_listens_is_a_reload_and_no_end(tmp_path: Path, workers: int) -> None:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--workers", str(workers)]
    command += ["--config", str(write(tmp_path, GOOD))]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        signal.signal(signal.SIGHUP, before)
        assert server.stdout is not None
        assert server.stderr is not None
        status = Path(f"/proc/{server.pid}/status")
        try:
            wait_until(lambda: bool(int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & 1), 20)
            server.send_signal(signal.SIGHUP)
            line = server.stdout.readline()
            assert line.startswith("gateway at ")
            assert f"(process {server.pid}; " in line
            assert any("configuration read again" in line for line in server.stderr)
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        finally:
            server.kill()


@pytest.mark.slow
def test_second_signal_stops_at_once() -> None:
    async def hang(_: object) -> None:
        import asyncio

        await asyncio.sleep(60)

    with (
        Upstream({"/v1/hang": hang}) as engine,
        process("--upstream", engine.url, "--port", "0") as (server, url),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as client,
    ):
        client.sendall(b"GET /v1/hang HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + 5
        while not engine.seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        assert server.poll() is None, "it waits for the request"
        os.kill(server.pid, signal.SIGTERM)
        server.wait(5)


LAME_DUCK = """
[server]
port = 0
lame_duck_s = {}
[[models]]
name = "m"
[[models.upstreams]]
name = "one"
url = "{}"
"""


def wait_ready(url: str) -> None:
    """Until its engine has been asked how it is."""
    deadline = time.monotonic() + 10
    while get(f"{url}/ready")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_lame_duck_answers_and_is_not_ready(tmp_path: Path) -> None:
    """From the first SIGTERM to the second one, which turns new requests away as without it."""
    with Upstream() as one:
        path = write(tmp_path, LAME_DUCK.format(600, one.url))
        with process("--config", str(path)) as (server, url):
            assert get(f"{url}/v1/models") == (200, "one")
            wait_ready(url)
            server.send_signal(signal.SIGTERM)
            assert server.stderr is not None
            assert "leaving: not ready any more, no new requests in 600 s" in server.stderr.readline()
            assert get(f"{url}/ready")[0] == 503
            assert get(f"{url}/health")[0] == 200
            assert get(f"{url}/v1/models") == (200, "one")
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=10)
            assert server.returncode == 0
            assert "stopping: no new requests" in err
            assert json.loads(out.splitlines()[-1])["outcome"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize(("given", "sent"), [(0.2, signal.SIGTERM), (600, signal.SIGINT)])
def test_lame_duck_ends_by_itself_and_not_at_all_for_ctrl_c(tmp_path: Path, given: float, sent: int) -> None:
    with Upstream() as one:
        path = write(tmp_path, LAME_DUCK.format(given, one.url))
        with process("--config", str(path)) as (server, url):
            wait_ready(url)
            server.send_signal(sent)
            _, err = server.communicate(timeout=10)
            assert ("leaving" in err) == (sent == signal.SIGTERM)
            assert "stopping: no new requests" in err


def test_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["gateway", "--upstream", "http://h:1", "--port", port]) == 2
    assert "to be free" in capsys.readouterr().err


def test_flags_are_validated_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, GOOD))
    assert main(["gateway", "--config", path, "--port", "99999", "--check"]) == 2
    assert "server.port: expected at most 65,535, got 99999" in capsys.readouterr().err
    assert main(["gateway", "--config", path, "--host", "192.0.2.1", "--check"]) == 2
    assert "port: expected to listen at 192.0.2.1:0" in capsys.readouterr().err


def test_check_may_run_beside_the_gateway_itself(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["gateway", "--config", str(write(tmp_path, GOOD)), "--port", port, "--check"]) == 0


@pytest.mark.parametrize("key", ["[access]\nusage_file", "[traces]\nfile"], ids=["usage", "traces"])
def test_check_looks_at_files_that_are_there_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    file = tmp_path / "file"
    path = write(tmp_path, f"{GOOD}\n{key} = {json.dumps(str(file))}\n")
    assert main(["gateway", "--config", str(path), "--port", "0", "--check"]) == 0
    assert not file.exists()
    file.write_text("something else" * 100)
    assert main(["gateway", "--config", str(path), "--port", "0", "--check"]) == 2
    assert "got file is not a database" in capsys.readouterr().err
