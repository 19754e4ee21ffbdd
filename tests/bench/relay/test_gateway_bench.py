"""The gateway's benchmark, small: every event arrives on both paths, and what cannot work is said."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from laguna_serve.bench import gateway
from laguna_serve.bench.relay import load_client, processes
from laguna_serve.serving.engine import find_port
from laguna_serve.serving.kit.results import read_result

pytestmark = pytest.mark.slow

SIZE = ["--streams", "1,3", "--requests", "3", "--rounds", "2", "--chunks", "5", "--gap-ms", "1"]


def test_every_event_arrives_on_both_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway.main([*SIZE, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(load["streams"], load["at_once"]) for load in result["loads"]] == [(1, False), (3, False), (3, True)]
    for load in result["loads"]:
        assert set(load["paths"]) == {"direct", "splice", "laguna"}
        for path in load["paths"].values():
            assert path["errors"] == 0
            assert path["events"] == path["events_expected"] == 2 * 3 * 5
        assert load["paths"]["direct"]["added_ttft_ms"]["median"] == 0
        assert load["paths"]["laguna"]["rss_mib"] > 10
        assert 0 < load["paths"]["laguna"]["own_us_per_event"] < 1e5
    assert "| 3 at once | laguna |" in (tmp_path / "gateway.md").read_text()


def test_peer_that_fails_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
    status = gateway.main([*SIZE, "--peer", f"gone=http://127.0.0.1:{port}", "--out", str(tmp_path)])
    assert status == 2
    expected = f"gateway.py: error: gone: expected 127.0.0.1:{port} to take connections, got Connection refused"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--peer", "direct=http://127.0.0.1:1"],
        ["--start", "laguna=sh {port} {engine}"],
        ["--workers", "2", "--peer", "laguna 2 workers=http://127.0.0.1:1"],
        ["--peer", "a=http://127.0.0.1:1", "--peer", "a=http://127.0.0.1:2"],
        ["--start", "a/b=sh {port} {engine}"],
    ],
)
def test_paths_have_names_of_their_own(flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A peer called direct took the place of the path that all others are held against."""
    with pytest.raises(SystemExit, match="2"):
        gateway.main([*flags, "--out", str(tmp_path)])
    assert "--start and --peer: expected a name of its own" in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["router", "a=http://", "a=http://127.0.0.1:99999", "a=http://127.0.0.1:x"])
def test_peer_needs_a_url(peer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A port that is none ended in a traceback, when all else was up."""
    with pytest.raises(SystemExit, match="2"):
        gateway.main(["--peer", peer, "--out", str(tmp_path)])
    assert f"expected NAME=http://host:port, got {peer!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ('sh -c "{port} {engine}', "No closing quotation"),
        ("no-such-relay {port} {engine}", "got no program 'no-such-relay'"),
    ],
)
def test_relay_that_cannot_be_started_is_refused_with_the_flags(
    command: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gateway.main(["--start", f"a={command}", "--out", str(tmp_path)])
    assert line in capsys.readouterr().err


def test_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert gateway.main(["--engine-port", str(port), "--out", str(tmp_path)]) == 2
    expected = f"port: expected 127.0.0.1:{port} to be free, got Address already in use; choose another port"
    assert expected in capsys.readouterr().err


def test_files_go_to_folders_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" \\ name'
    folder.mkdir()
    tables = tomllib.loads(processes.write_config(folder, [1]).read_text())
    assert tables["access"]["usage_file"] == str(folder / "usage.sqlite")


def test_relay_that_does_not_end_by_itself_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command waited for it for ever, and left what it had started."""
    monkeypatch.setattr(processes, "END_S", 0.2)
    port = find_port("127.0.0.1")
    child = f"{sys.executable} -m http.server {port} --bind 127.0.0.1"
    command = ["sh", "-c", f"trap : TERM; {child} & while :; do sleep 0.1; done"]
    with processes.run_child(command, port, tmp_path / "a.log") as relay:
        family = [relay, *relay.children(recursive=True)]
        assert len(family) > 1
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def test_gateway_is_measured_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = gateway.GatewayBenchConfig(streams=(1,), requests=1, rounds=1, chunks=3, gap_ms=1, out=tmp_path)
    result = gateway.measure_gateway(config)
    assert result.held
    assert set(result.loads[0].paths) == {"direct", "splice", "laguna"}
    assert read_result(tmp_path / "gateway.json", gateway.GatewayBenchResult) == result
    assert capsys.readouterr().out == ""


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class SilentSome(socketserver.StreamRequestHandler):
    """A peer that streams, until it has answered so many; whoever comes later waits for nothing."""

    answers = 0

    def handle(self) -> None:
        while (line := self.rfile.readline()).startswith(b"POST"):
            length = next(int(head.split(b":")[1]) for head in self.rfile if head.lower().startswith(b"content-length"))
            self.rfile.readline()
            self.rfile.read(length)
            if type(self).answers == 0:
                continue
            type(self).answers -= 1
            event = b'data: "ns%d "\n\n' % time.monotonic_ns()
            self.wfile.write(HEAD + 2 * (b"%x\r\n%s\r\n" % (len(event), event)) + b"0\r\n\r\n")
        assert not line


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(load_client, "STREAM_S", 0.5)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), SilentSome) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"some=http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_stream_that_does_not_end_is_an_error(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SilentSome, "answers", 5)
    size = ["--streams", "3", "--requests", "3", "--rounds", "1", "--chunks", "2", "--gap-ms", "1"]
    assert gateway.main([*size, "--peer", peer, "--out", str(tmp_path)]) == 2  # none is left for those at once
    result = read_result(tmp_path / "gateway.json", gateway.GatewayBenchResult)
    assert [(load.at_once, load.paths["some"].errors) for load in result.loads] == [(False, 1)]


def test_peer_without_a_stream_is_named(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SilentSome, "answers", 0)
    size = ["--streams", "1", "--requests", "1", "--rounds", "1", "--chunks", "2", "--gap-ms", "1"]
    assert gateway.main([*size, "--peer", peer, "--out", str(tmp_path)]) == 2
    assert "some: expected a whole stream in every round of 1, got none in one" in capsys.readouterr().err
