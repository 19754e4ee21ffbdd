"""What scripts/clients.sh is made of: the proxy that notes requests or breaks streams, the programs, the report."""

from __future__ import annotations

import http.client
import json
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest

from laguna_serve.scripts.clients import run
from laguna_serve.scripts.clients.agents import Agent, list_agents, run_agent
from laguna_serve.scripts.clients.recorder import RecordedRequest, Recorder, record
from laguna_serve.scripts.clients.report import (
    ClientCheck,
    ClientsResult,
    failures,
    render_markdown,
    render_text,
    table,
)
from laguna_serve.serving.gateway.config import parse_config

ROOT = Path(__file__).resolve().parents[3]
CHECKS = (
    ClientCheck(client="a", version="1", check="plain", ok=True, detail="x"),
    ClientCheck(client="a", version="1", check="streamed", ok=False, detail="expected\nmore"),
    ClientCheck(client="b", version="2", check="plain", ok=True, detail="y"),
)
RESULT = ClientsResult(
    command="bash scripts/clients.sh",
    date="2026-11-26T00:00:00+00:00",
    server="laguna serve m",
    versions={"node": "20"},
    held=2,
    checks=CHECKS,
    minutes=1.5,
)


class Site(BaseHTTPRequestHandler):
    """Echoes a body, refuses one path, streams five events on another."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        refuses = self.path.startswith("/refused")
        self.send_response(400 if refuses else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number in range(5):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(url: str, body: bytes | None = None) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
        found: bytes = answer.read()
        return found


def test_recorder_passes_everything_and_notes_it(site: str) -> None:
    with record(site) as recorder:
        assert ask(f"{recorder.url}/echo?x=1", b"body") == b"body"
        with pytest.raises(urllib.error.HTTPError, match="400") as refusal:
            ask(f"{recorder.url}/refused", b"why")
        assert refusal.value.read() == b"why"
        assert ask(f"{recorder.url}/stream").count(b"data: ") == 5
    assert recorder.requests == [
        RecordedRequest("POST", "/echo?x=1", 200),
        RecordedRequest("POST", "/refused", 400, "why"),
        RecordedRequest("GET", "/stream", 200),
    ]


def test_recorder_breaks_streams_and_nothing_else(site: str) -> None:
    with record(site, cut_after=1) as recorder:
        assert ask(f"{recorder.url}/echo", b"body") == b"body"
        with pytest.raises((ConnectionError, http.client.IncompleteRead)):
            ask(f"{recorder.url}/stream")


def test_recorder_has_another_model_loaded_first(site: str) -> None:
    with record(site, other="dense") as recorder:
        recorder.swaps = 1
        for _ in range(2):
            assert ask(f"{recorder.url}/v1/messages", b"body") == b"body"
        assert recorder.swaps == 0
        recorder.swaps = 1
        ask(f"{recorder.url}/v1/messages/count_tokens", b"body")
        assert recorder.swaps == 1, "that one asks no model"


def test_models_that_swap_are_a_configuration() -> None:
    config = parse_config(tomllib.loads(run.format_swapping(["--max-num-batched-tokens", "512"], draft=True)), "here")
    assert [model.name for model in config.models] == ["teacher", "dense"]
    planned = [model.engine.memory_gib for model in config.models if model.engine is not None]
    assert config.groups[0].memory_gib is not None
    assert max(each for each in planned if each) < config.groups[0].memory_gib < sum(each for each in planned if each)


def test_program_that_ends_early_is_a_check_that_falls_short() -> None:
    line = msgspec.json.encode(CHECKS[0]).decode()
    source = f"import sys; print({line!r}); print('noise'); sys.exit('no such module')"
    checks = run.run_checks("Python SDKs", [sys.executable, "-c", source], {}, ROOT)
    assert checks[0] == CHECKS[0]
    assert (checks[1].ok, checks[1].detail) == (False, "exit status 1: no such module")
    assert len(checks) == 2


@pytest.mark.parametrize(
    ("asked", "status", "first", "task"),
    [
        ([RecordedRequest("POST", "/v1/messages?beta=true", 200)], 0, True, True),
        ([RecordedRequest("POST", "/v1/messages", 400, "auto tool choice requires")], 1, False, False),
        ([RecordedRequest("HEAD", "/", 200)], 0, False, True),
    ],
    ids=["works", "refused", "asks nothing"],
)
def test_agent_is_judged_by_its_requests_and_its_end(
    tmp_path: Path, asked: list[RecordedRequest], status: int, first: bool, task: bool
) -> None:
    recorder = Recorder("http://127.0.0.1:1", [RecordedRequest("POST", "/v1/messages", 500, "of an earlier agent")])
    binary = tmp_path / "agent"
    binary.write_text(f"#!/bin/sh\ncat config\necho $ANTHROPIC_BASE_URL $HOME\nexit {status}\n")
    binary.chmod(0o755)
    agent = Agent("a", "a", ("agent",), {"ANTHROPIC_BASE_URL": "u"}, {"work/config": "mine\n"}, "/v1/messages")

    class Noting(list[RecordedRequest]):
        """The requests come while the agent runs."""

        def __len__(self) -> int:
            length = super().__len__()
            if not (tmp_path / "home" / "asked").exists():
                (tmp_path / "home" / "asked").touch()
                self.extend(asked)
            return length

    recorder.requests = Noting(recorder.requests)
    checks = run_agent(agent, "1", tmp_path, tmp_path / "home", recorder)
    assert [check.ok for check in checks] == [first, task]
    assert f"exit status {status}: mine\nu {tmp_path / 'home'}" in checks[1].detail
    assert "earlier agent" not in str(checks)


def test_agents_ask_nobody_but_the_server() -> None:
    for agent in list_agents("http://127.0.0.1:1", "m"):
        written = json.dumps([agent.environment, agent.files])
        assert "http://127.0.0.1:1" in written
        assert written.count("http") == written.count("http://127.0.0.1:1") + written.count("opencode.ai/config.json")


def test_report_has_a_row_for_each_client() -> None:
    assert table(CHECKS) == [
        ["client", "version", "plain", "streamed"],
        ["a", "1", "yes", "no"],
        ["b", "2", "yes", "–"],
    ]
    assert failures(CHECKS) == ["a, streamed: expected\nmore"]
    assert "| a | 1 | yes | no |" in render_markdown(RESULT)
    assert "- a, streamed: expected more\n" in render_markdown(RESULT)
    assert "2 of 3 checks hold" in render_markdown(RESULT)
    assert render_text(RESULT).splitlines()[1] == "a       1        yes    no"


def test_node_packages_are_locked() -> None:
    folder = ROOT / "scripts" / "clients"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert "resolved" not in (folder / "package-lock.json").read_text(), "a lock of one machine's registry"
