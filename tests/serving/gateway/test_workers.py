"""A gateway of several processes: one set of limits, one queue, one status; and what a death costs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from gateway_fakes import Exchange, Reply, Upstream, make_request, read_reply, wait_until

from laguna_serve.serving.gateway.config import ConfigError, parse_config
from laguna_serve.serving.gateway.counts.board import ROWS
from laguna_serve.serving.gateway.traces.store import TraceFile

CHAT, BODY = "/v1/chat/completions", b'{"model": "m", "max_tokens": 8}'
WORKERS = 3
LIMITS = ("max_in_flight", "requests_per_minute", "tokens_per_minute", "tokens_per_day")


class Engine(Upstream):
    """Holds its answers back until `gate` is open; `most` is how many it had at once, `order` in which they came."""

    def __init__(self) -> None:
        super().__init__({CHAT: self.answer})
        self.gate = threading.Event()
        self.now = self.most = 0
        self.order: list[str] = []
        self.said: dict[str, Any] = {}

    async def answer(self, exchange: Exchange) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.order.append(exchange.body.decode())
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.002)
            usage = {"usage": {"prompt_tokens": 11, "completion_tokens": 5}}
            await exchange.answer(json.dumps(usage | self.said).encode())
        finally:
            self.now -= 1


class Front:
    """The gateway's process, and connections to it."""

    def __init__(self, process: subprocess.Popen[str], url: str, admin: str) -> None:
        self.process = process
        self.port, self.admin = (int(address.rpartition(":")[2]) for address in (url, admin))

    def send(self, key: str = "sk", body: bytes = BODY, path: str = CHAT) -> socket.socket:
        """Send a request on a connection of its own."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(make_request(path, body, f"x-api-key: {key}\r\n"))
        return connection

    def refuses(self) -> bool:
        """Nobody listens any more."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=20).close()
        except ConnectionRefusedError:
            return True
        return False

    def ask(self, key: str = "sk") -> Reply:
        with self.send(key) as connection:
            return read_reply(connection)

    def get(self, path: str, *, admin: bool = True, method: str = "GET") -> Reply:
        with socket.create_connection(("127.0.0.1", self.admin if admin else self.port), timeout=20) as connection:
            text = make_request(path, b"" if method == "POST" else None, "x-api-key: sk\r\n", method)
            connection.sendall(text.replace(b"host: x", b"host: 127.0.0.1"))
            return read_reply(connection)

    def list_workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def find_owner(self, connection: socket.socket) -> psutil.Process:
        """The worker that has accepted a connection."""
        port = connection.getsockname()[1]
        found: list[psutil.Process] = []

        def look() -> bool:
            for worker in self.list_workers():
                found.extend(worker for c in worker.net_connections() if c.raddr and c.raddr.port == port)
            return bool(found)

        wait_until(look, 10)
        return found[0]


@contextmanager
def start(
    path: Path, engine: Upstream, text: str = "", *, upstream: bool = False, workers: int = WORKERS, **limits: int
) -> Iterator[Front]:
    write(path, engine, text, **limits)
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--port", "0", "--workers", str(workers)]
    command += ["--upstream", engine.url, "--model", "m"] if upstream else ["--config", str(path)]
    with (
        (path.parent / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            said = re.fullmatch(r"gateway at (\S+) for m, status at (\S+)  \(process (\d+); Ctrl-C stops it\)\n", line)
            assert said is not None, line
            assert int(said[3]) == process.pid
            front = Front(process, said[1], said[2])
            yield front
        finally:
            if process.poll() is None:
                workers = psutil.Process(process.pid).children()
                process.kill()
                for worker in workers:
                    worker.kill()


def write(path: Path, engine: Upstream, text: str = "", engine_slots: int = 64, **limits: int) -> None:
    """The configuration: key `sk` with some limits, and another one without."""
    keys = ""
    for name, secret in (("k", "sk"), ("free", "free")):
        keys += f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
        keys += "".join(f"{limit} = {limits[limit]}\n" for limit in LIMITS if name == "k" and limit in limits)
    model = f'[[models]]\nname = "m"\n[[models.upstreams]]\nname = "a"\nurl = "{engine.url}"\n'
    path.write_text(f"{text}\n{keys}{model}max_in_flight = {engine_slots}\n")


def collect(connections: list[socket.socket]) -> list[int]:
    """The status of every answer; connections are closed."""
    found = []
    for connection in connections:
        with connection:
            found.append(read_reply(connection).status)
    return found


def count_answered(connections: list[socket.socket]) -> int:
    return len(select.select(connections, [], [], 0)[0])


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as found:
        yield found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.toml"


@pytest.mark.slow
def test_a_keys_places_are_those_of_all_workers(path: Path, engine: Engine) -> None:
    with start(path, engine, max_in_flight=7) as front:
        for _ in range(2):  # what was given back may be taken again
            engine.gate.clear()
            wait_until(lambda: read_load(front) == (0, 0), 10)
            sent = [front.send() for _ in range(40)]
            wait_until(lambda sent=sent: count_answered(sent) == 33, 20)
            engine.gate.set()
            assert sorted(collect(sent)) == [200] * 7 + [429] * 33
        assert engine.most == 7
        assert len({front.find_owner(c).pid for c in [front.send("free") for _ in range(24)]}) > 1


@pytest.mark.slow
def test_requests_of_a_minute_are_those_of_all_workers(path: Path, engine: Engine) -> None:
    engine.gate.set()
    with start(path, engine, requests_per_minute=4) as front:
        replies = [front.ask() for _ in range(20)]  # within the 15 s in which one comes back
    assert [reply.status for reply in replies] == [200] * 4 + [429] * 16
    left = [int(reply.header("x-ratelimit-remaining-requests") or -1) for reply in replies[:4]]
    assert left == [3, 2, 1, 0]


@pytest.mark.slow
def test_tokens_of_a_minute_are_those_of_all_workers(path: Path, engine: Engine) -> None:
    engine.gate.set()
    with start(path, engine, tokens_per_minute=16 * 5 + 4) as front:
        assert [front.ask().status for _ in range(16)] == [200] * 5 + [429] * 11, "16 come back in 11 s"


@pytest.mark.slow
def test_a_days_budget_is_that_of_all_workers_and_outlives_them(path: Path, engine: Engine) -> None:
    engine.gate.set()
    text = f'[access]\nusage_file = "{path.parent / "usage.sqlite"}"\nusage_write_s = 0.05'
    with start(path, engine, text, tokens_per_day=160) as front:
        found = [front.ask().status for _ in range(14)]
        assert found == [200] * 10 + [429] * 4, "each costs 16 tokens, as was estimated"
        wait_until(lambda: front.get("/admin/usage").json()["keys"]["k"]["today"]["m"]["requests"] == 10, 10)
        key = front.get("/admin/usage").json()["keys"]["k"]
        assert key["tokens_today"] == 160
        assert key["today"]["m"] == {"requests": 10, "prompt_tokens": 110, "output_tokens": 50, "refused": 4}
        assert key["since_start"]["m"] == key["today"]["m"]
        front.process.terminate()
        assert front.process.wait(20) == 0
    with start(path, engine, text, tokens_per_day=176) as front:
        assert [front.ask().status for _ in range(4)] == [200, 429, 429, 429]
        assert front.get("/admin/usage").json()["keys"]["k"]["today"]["m"]["requests"] == 11


@pytest.mark.slow
def test_the_queue_is_one(path: Path, engine: Engine) -> None:
    """Its bound, and who is next: across all workers, as they came."""
    with start(path, engine, "[limits]\nmax_queued = 13", engine_slots=1) as front:
        sent = []
        for i in range(20):
            sent.append(front.send("free", json.dumps({"model": "m", "n": i}).encode()))
            expected = max(0, i - 13)
            wait_until(lambda n=expected: count_answered(sent) == n, 10)
            if i < 14:
                wait_until(lambda n=i: sum(read_load(front)) == n + 1, 10)
        assert read_load(front) == (1, 13)
        assert front.get("/admin/status").json()["in_flight"] == 14
        engine.gate.set()
        assert collect(sent) == [200] * 14 + [429] * 6
    assert engine.most == 1
    assert [json.loads(body)["n"] for body in engine.order] == list(range(14))


def read_load(front: Front) -> tuple[int, int]:
    """What is in the engine, and what waits."""
    model = front.get("/admin/status").json()["models"]["m"]
    return model["upstreams"][0]["in_flight"], model["queued"]


@pytest.mark.slow
def test_smaller_priorities_are_first_across_workers(path: Path, engine: Engine) -> None:
    with start(path, engine, engine_slots=1) as front:
        sent = [front.send("free", json.dumps({"model": "m", "priority": 0}).encode())]
        wait_until(lambda: read_load(front) == (1, 0), 10)
        for i, priority in enumerate((9, 3, 7, 1, 8, 2, 6, 4, 5, 0)):
            sent.append(front.send("free", json.dumps({"model": "m", "priority": priority}).encode()))
            wait_until(lambda n=i: read_load(front) == (1, n + 1), 10)
        engine.gate.set()
        assert set(collect(sent)) == {200}
    assert [json.loads(body)["priority"] for body in engine.order] == [0, *range(10)]


@pytest.mark.slow
def test_a_worker_that_is_killed_gives_its_places_back(path: Path, engine: Engine) -> None:
    with start(path, engine, max_in_flight=6, engine_slots=6) as front:
        sent = [front.send() for _ in range(6)]
        wait_until(lambda: read_load(front) == (6, 0), 10)
        victim = front.find_owner(sent[0])
        mine = [c for c in sent if front.find_owner(c).pid == victim.pid]
        waiting = [front.send("free") for _ in range(16)]
        wait_until(lambda: read_load(front) == (6, len(waiting)), 10)
        owners = [front.find_owner(c).pid for c in waiting]
        before = {worker.pid for worker in front.list_workers()}
        victim.kill()
        wait_until(lambda: len({w.pid for w in front.list_workers()} - before) == 1, 20)
        engine.gate.set()
        assert all(read_reply(c).cut for c in mine)
        assert collect([c for c in sent if c not in mine]) == [200] * (6 - len(mine))
        assert [read_reply(c).status for c in waiting] == [0 if owner == victim.pid else 200 for owner in owners]
        assert [front.ask().status for _ in range(30)] == [200] * 30
        wait_until(lambda: read_load(front) == (0, 0), 10)
        status = front.get("/admin/status").json()
        assert status["workers"] == WORKERS
        assert [key["in_flight"] for key in status["keys"]] == [0, 0]
    assert "ended by signal 9, with what it had in flight; it is started again" in (path.parent / "log").read_text()


@pytest.mark.slow
def test_connections_wait_while_their_worker_is_started_again(path: Path, engine: Engine) -> None:
    engine.gate.set()
    with start(path, engine) as front:
        for worker in front.list_workers():
            worker.kill()
        assert [front.ask("free").status for _ in range(30)] == [200] * 30


@pytest.mark.slow
def test_metrics_are_those_of_all_workers(path: Path, engine: Engine) -> None:
    engine.gate.set()
    with start(path, engine, max_in_flight=5) as front:
        assert {front.ask().status for _ in range(40)} == {200}
        expected = {
            "requests_total": 40.0,
            "key_requests_total": 40.0,
            "output_tokens_total": 200.0,
            "ttft_seconds_count": 40.0,
            "upstream_up": float(WORKERS),
            "key_in_flight": 0.0,
        }
        for _ in range(6):  # whichever worker is asked

            def is_complete() -> bool:
                text = front.get("/metrics", admin=False).body.decode()
                assert len(re.findall(r"^# TYPE laguna_gateway_requests_total", text, re.MULTILINE)) == 1
                return {name: sum_samples(text, f"laguna_gateway_{name}") for name in expected} == expected

            wait_until(is_complete, 10)
        status = front.get("/admin/status").json()
        assert (status["workers"], status["models"]["m"]["upstreams"][0]["requests"]) == (WORKERS, 40)
        assert b"3 processes" in front.get("/").body


@pytest.mark.slow
def test_traces_of_all_workers_are_in_one_file(path: Path, engine: Engine) -> None:
    engine.gate.set()
    traces, body = path.with_name("traces.db"), b'{"model": "m", "return_token_ids": true}'
    engine.said = {"prompt_token_ids": [1, 2], "choices": [{"index": 0, "token_ids": [3], "finish_reason": "stop"}]}
    with start(path, engine, f'[traces]\nfile = "{traces}"') as front:
        for connection in [front.send("free", body) for _ in range(40)]:
            with connection:
                assert read_reply(connection).status == 200
        front.process.terminate()
        assert front.process.wait(20) == 0
    found = list(TraceFile(traces).read())
    assert [(trace.prompt_token_ids, trace.token_ids) for trace in found] == [([1, 2], [3])] * 40
    assert len({trace.request_id for trace in found}) == 40


def sum_samples(text: str, name: str) -> float:
    """Over all workers; of requests those of chats alone."""
    lines = [line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)]
    return sum(float(line.rpartition(" ")[2]) for line in lines if "path=" not in line or CHAT in line)


@pytest.mark.slow
def test_engines_are_not_steered(path: Path, engine: Engine) -> None:
    with start(path, engine) as front:
        for route in ("/pause", "/resume", "/reset_prefix_cache"):
            reply = front.get(route, method="POST")
            assert (reply.status, "workers = 1" in reply.body.decode()) == (409, True)


@pytest.mark.slow
def test_reload_reaches_all_or_none(path: Path, engine: Engine) -> None:
    engine.gate.set()
    with start(path, engine, requests_per_minute=1000) as front:
        log = path.parent / "log"
        keys = (f'[[keys]]\nname = "k{i}"\nsha256 = "{i:064x}"\n' for i in range(ROWS + 1))
        more = path.read_text() + "\n" + "".join(keys)  # than are counted
        refused = ("nonsense = 1", 'models = [{name = "m", engine = {model = "x"}}]', more)
        for number, text in enumerate(refused, start=1):
            path.write_text(text)
            front.process.send_signal(signal.SIGHUP)
            # Each: of the last one the file that comes next would be read otherwise.
            wait_until(lambda number=number: log.read_text().count("going on as before") == number, 10)
            assert "read again" not in log.read_text()
        write(path, engine, requests_per_minute=3)
        front.process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.read_text().count("configuration read again") == WORKERS, 10)
        assert sorted(front.ask().status for _ in range(12)) == [200] * 3 + [429] * 9
        for worker in front.list_workers():  # those that follow have it, too
            worker.kill()
        assert {front.ask().status for _ in range(6)} == {429}
        assert front.ask("free").status == 200


@pytest.mark.slow
def test_hangup_without_a_file_is_an_end_in_good_order(path: Path, engine: Engine) -> None:
    with start(path, engine, upstream=True) as front:
        sent = [front.send("free") for _ in range(4)]
        wait_until(lambda: read_load(front) == (4, 0), 10)
        front.process.send_signal(signal.SIGHUP)
        wait_until(lambda: (path.parent / "log").read_text().count("stopping: no new requests") == WORKERS, 10)
        wait_until(front.refuses, 10)  # said first, then done
        engine.gate.set()
        assert collect(sent) == [200] * 4
        assert front.process.wait(20) == 0


@pytest.mark.slow
def test_streams_in_flight_finish_at_sigterm(path: Path, engine: Engine) -> None:
    with start(path, engine) as front:
        sent = [front.send("free") for _ in range(12)]
        wait_until(lambda: read_load(front) == (12, 0), 10)
        for process in (*front.list_workers(), front.process):  # as systemd does it
            process.terminate()
        wait_until(lambda: (path.parent / "log").read_text().count("stopping: no new requests") == WORKERS, 10)
        engine.gate.set()
        assert collect(sent) == [200] * 12
        assert front.process.wait(20) == 0


@pytest.mark.slow
def test_second_signal_ends_everything_at_once(path: Path, engine: Engine) -> None:
    with start(path, engine) as front:
        sent = [front.send("free") for _ in range(6)]
        wait_until(lambda: read_load(front) == (6, 0), 10)
        front.process.send_signal(signal.SIGINT)
        wait_until(lambda: (path.parent / "log").read_text().count("stopping: no new requests") == WORKERS, 10)
        front.process.send_signal(signal.SIGINT)
        assert front.process.wait(10) == 0
        assert {read_reply(c).status for c in sent} <= {0, 503}


@pytest.mark.slow
def test_no_worker_outlives_a_parent_that_is_killed(path: Path, engine: Engine) -> None:
    with start(path, engine) as front:
        workers = front.list_workers()
        sent = [front.send("free") for _ in range(6)]
        wait_until(lambda: read_load(front) == (6, 0), 10)
        front.process.kill()
        wait_until(lambda: not can_connect(front), 10)
        engine.gate.set()
        assert collect(sent) == [200] * 6, "what is in flight may finish"
        assert psutil.wait_procs(workers, 10)[1] == []


def can_connect(front: Front) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", front.port)) == 0


@pytest.mark.slow
def test_what_cannot_start_says_why_once(path: Path, engine: Engine) -> None:
    path.with_name("usage").write_text("no database, and long enough to be none" * 50)
    write(path, engine, f'[access]\nusage_file = "{path.with_name("usage")}"')
    done = run_gateway(path, "--port", "0")
    assert done.returncode == 2
    assert done.stderr.count("expected a file of usage that can be written") == 1
    with socket.create_server(("127.0.0.1", 0)) as other:
        write(path, engine)
        done = run_gateway(path, "--port", str(other.getsockname()[1]))
    assert done.returncode == 2
    assert "to be free, got Address already in use" in done.stderr


def run_gateway(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--config", str(path), "--workers", "2"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, check=False, env=os.environ)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"models": [{"name": "m", "engine": {"model": "tests/toy/teacher"}}]}, "beside models.m.engine, got 2"),
        ({"admin": {"trl": "m"}}, "beside admin.trl, got 2"),
    ],
)
def test_what_one_process_alone_can_do_is_refused(tables: dict[str, Any], words: str) -> None:
    models = [{"name": "m", "upstreams": [{"name": "a", "url": "http://127.0.0.1:9"}]}]
    with pytest.raises(ConfigError, match=f"expected server.workers = 1 {words}"):
        parse_config({"models": models, "server": {"workers": 2}} | tables, "here")
