"""Traces: what is recorded of answers in every form, never text nor keys; bounds, failures, the trainer's reader."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from gateway_engine import PATH, RlEngine
from gateway_fakes import SSE, Exchange, Gateway, gateway, make_request, read_reply, wait_until

from laguna_serve.serving.cli import main
from laguna_serve.serving.client.traffic import TrafficRecord, read_traffic
from laguna_serve.serving.gateway.telemetry import copies
from laguna_serve.serving.gateway.traces import recorder, store
from laguna_serve.serving.gateway.traces.answers import AnswerError, read_answer
from laguna_serve.serving.gateway.traces.store import Trace, TraceFile, TraceFileError

CHAT = "/v1/chat/completions"
SECRET = "a very secret prompt"
KEY = {"name": "alice", "sha256": hashlib.sha256(b"sk-secret").hexdigest()}
ASKED = {"model": "m", "prompt": SECRET, "return_token_ids": True, "temperature": 0.7, "seed": 5}


def whole(*choices: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"object": "text_completion", "choices": list(choices), **more}).encode()


def stream(*events: dict[str, Any], end: bool = True) -> bytes:
    lines = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return lines + (b"data: [DONE]\n\n" if end else b"")


def test_answers_in_every_form_are_the_same_choice() -> None:
    logs = {"token_logprobs": [-0.5, -1.0]}
    completion = {
        "index": 0,
        "prompt_token_ids": [1, 2],
        "token_ids": [3, 4],
        "logprobs": logs,
        "finish_reason": "stop",
    }
    chat_logs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]}
    chat = {
        "index": 0,
        "message": {"content": "x"},
        "token_ids": [3, 4],
        "logprobs": chat_logs,
        "finish_reason": "stop",
    }
    halves = [{"index": 0, "prompt_token_ids": [1, 2], "token_ids": [3], "logprobs": {"token_logprobs": [-0.5]}}]
    halves.append({"index": 0, "token_ids": [4], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"})
    bodies = [
        whole(completion),
        whole(chat, prompt_token_ids=[1, 2]),
        stream(*({"choices": [half]} for half in halves), {"choices": [], "usage": {"completion_tokens": 2}}),
        b": heartbeat\n\n" + stream(*({"choices": [half]} for half in halves)),
    ]
    for body in bodies:
        (choice,) = read_answer(body).choices
        assert (choice.prompt_token_ids, choice.token_ids, choice.logprobs) == ([1, 2], [3, 4], [-0.5, -1.0])
        assert choice.finish_reason == "stop"


def test_several_choices_and_what_the_engine_says_of_drafts() -> None:
    events = [{"choices": [{"index": i, "prompt_token_ids": [1], "token_ids": [10 + i]}]} for i in (1, 0, 2)]
    answer = read_answer(stream(*events, {"choices": [], "metrics": {"speculative_decoding": {"accepted": 3}}}))
    assert [choice.token_ids for choice in answer.choices] == [[10], [11], [12]]
    assert answer.speculation == {"accepted": 3}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'{"error": {"message": "x"}}',
        whole({"index": 0, "text": "without ids"}),
        whole({"index": 0, "prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": {"token_logprobs": [-1.0]}}),
        whole(),
        whole({"index": 0, "prompt_token_ids": [1], "token_ids": [2], "logprobs": {"token_logprobs": [None]}}),
        whole({"index": 0, "prompt_token_ids": [1], "token_ids": [1 << 31]}),
        whole({"index": 0, "prompt_token_ids": [1], "token_ids": [1.5]}),
        whole({"index": 0, "prompt_token_ids": [1], "token_ids": "ab"}),
        whole(*({"index": index, "prompt_token_ids": [1], "token_ids": [2]} for index in (0, "x"))),
        b'{"choices": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        stream({"choices": [{"index": 0, "prompt_token_ids": [1], "token_ids": [2]}]}, end=False),
        b"data: {\n\n",
    ],
)
def test_what_is_no_answer_in_tokens_is_none(body: bytes) -> None:
    with pytest.raises(AnswerError):
        read_answer(body)


def make_trace(number: int, size: int = 10) -> Trace:
    return Trace(
        time=float(number),
        request_id=f"r{number}",
        choice=0,
        key=None,
        model="m",
        engine="a",
        weight_versions=("7",) if number % 2 else ("7", "8"),
        draft_versions=("default",),
        temperature=1.0,
        seed=None,
        finish_reason="stop",
        first_token_s=0.1,
        total_s=0.2,
        prompt_token_ids=[number] * size,
        token_ids=list(range(size)),
        logprobs=[-0.5] * size,
        routed_experts=None,
        speculation=None,
    )


def test_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    traces = [make_trace(number) for number in range(20)]
    file = TraceFile(tmp_path / "traces.db", 1 << 20)
    assert file.add(traces) == 0
    assert list(file.read()) == traces
    file.close()
    again = TraceFile(tmp_path / "traces.db")
    assert [trace.time for trace in again.read("time >= ?", (15.0,))] == [15, 16, 17, 18, 19]
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["traces.db"]


def test_full_file_loses_its_oldest(tmp_path: Path) -> None:
    """Ten times as much as there is room for: the file stays near its bound, and the last ones are in it."""
    path, bound = tmp_path / "traces.db", 1 << 20
    file = TraceFile(path, bound)
    dropped = sum(file.add([make_trace(at * 10 + one, size=1000) for one in range(10)]) for at in range(80))
    kept = [trace.time for trace in file.read()]
    file.close()
    assert dropped > 500
    assert kept == [float(number) for number in range(800 - len(kept), 800)]
    assert len(kept) > 50
    assert path.stat().st_size < 1.3 * bound


def test_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, and longer than a header of one hundred bytes " * 3)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    for name in ("text", "other"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(
            TraceFileError, match=r"expected a file of traces, got .*; name another one, or move it away"
        ):
            TraceFile(tmp_path / name, 1 << 20)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(TraceFileError, match="expected a file of traces, got none"):
        TraceFile(tmp_path / "absent")


@pytest.mark.parametrize("value", [b"\1\2\3", 7], ids=["cut", "number"])
def test_row_that_is_broken_is_a_line(tmp_path: Path, value: bytes | int) -> None:
    file = TraceFile(tmp_path / "traces.db", 1 << 20)
    file.add([make_trace(1)])
    with file._file:
        file._file.execute("UPDATE traces SET token_ids = ?", (value,))
    with pytest.raises(TraceFileError, match=r"expected traces, got .*; copy what is left with \.recover"):
        list(file.read())
    file.close()


def test_what_was_being_written_when_it_was_killed_is_gone_and_the_rest_is_there(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "traces.db", 1 << 20)
    file.add([make_trace(1)])
    copied = tmp_path / "copied.db"
    for suffix in ("", "-wal"):  # as a killed process leaves them: the last page half-written
        data = (tmp_path / f"traces.db{suffix}").read_bytes()
        (tmp_path / f"copied.db{suffix}").write_bytes(data)
    file.add([make_trace(2)])
    more = (tmp_path / "traces.db-wal").read_bytes()
    (tmp_path / "copied.db-wal").write_bytes(more[:-2000])
    file.close()
    again = TraceFile(copied, 1 << 20)
    assert [trace.time for trace in again.read()] == [1.0]
    again.close()


class Engine(RlEngine):
    """Answers with token ids as it is told to; `pieces` of a stream wait for `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.handlers[CHAT] = self.complete

    async def complete(self, exchange: Exchange) -> None:
        body = json.loads(exchange.body)
        ids = {"prompt_token_ids": [1, 2, 3], "token_ids": [7, 8]}
        if not body.get("stream"):
            wanted = range(body.get("n", 1))
            choices = [{"index": i, "text": "secret answer", **ids, "finish_reason": "length"} for i in wanted]
            await exchange.answer(whole(*choices))
            return
        await exchange.start(SSE)
        await exchange.chunk(stream({"choices": [{"index": 0, **ids}]}, end=False))
        if body.get("user") == "wait":
            await asyncio.wait_for(self.go_on.wait(), 10)
        await exchange.chunk(stream({"choices": [{"index": 0, "token_ids": [9], "finish_reason": "stop"}]}))
        await exchange.end()


def read_all(path: Path) -> list[Trace]:
    file = TraceFile(path)
    try:
        return list(file.read())
    finally:
        file.close()


def recorded(front: Gateway, outcome: str) -> float:
    name = "laguna_gateway_traces_total"
    return front.relay._metrics.registry.get_sample_value(name, {"outcome": outcome}) or 0.0


@pytest.mark.slow
def test_gateway_records_tokens_and_no_text_nor_key(tmp_path: Path) -> None:
    path = tmp_path / "traces.db"
    with Engine() as one, gateway(one, keys=[KEY], traces={"file": str(path)}) as front:
        headers = "x-api-key: sk-secret\r\nx-request-id: mine\r\n"
        body = json.dumps({**ASKED, "n": 2}).encode()
        assert front.ask(PATH, body, headers=headers).status == 200
        chat = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "return_token_ids": True}
        assert front.ask(CHAT, json.dumps({**chat, "stream": True}).encode(), headers=headers).status == 200
        assert front.ask(PATH, json.dumps({"model": "m", "prompt": "x"}).encode(), headers=headers).status == 200
        wait_until(lambda: recorded(front, "kept") == 3)
        assert recorded(front, "no_tokens") == 1
    first, second, third = read_all(path)
    assert (first.request_id, first.key, first.model, first.engine) == ("mine", "alice", "m", "a")
    assert (first.temperature, first.seed, first.choice, second.choice) == (0.7, 5, 0, 1)
    assert (first.prompt_token_ids, first.token_ids, first.finish_reason) == ([1, 2, 3], [7, 8], "length")
    assert (third.token_ids, third.temperature, third.finish_reason) == ([7, 8, 9], None, "stop")
    assert 0 <= (third.first_token_s or -1) <= third.total_s
    data = path.read_bytes()
    assert SECRET.encode() not in data
    assert b"secret answer" not in data
    assert b"sk-secret" not in data


@pytest.mark.parametrize("default", [None, 0.7])
def test_temperature_that_nobody_states_is_the_engines_or_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], default: float | None
) -> None:
    """Also in a file that was made when it was 1; what is not known is no traffic."""
    path, out = tmp_path / "traces.db", tmp_path / "traffic.jsonl"
    old = ", ".join(column + (" NOT NULL" if column == "temperature REAL" else "") for column in store.COLUMNS)
    with sqlite3.connect(path) as made:
        made.execute(f"CREATE TABLE traces ({old})")
        made.execute(f"PRAGMA user_version = {store.MARK}")
        holes = ", ".join("?" * len(store.NAMES))
        made.execute(f"INSERT INTO traces VALUES ({holes})", store._to_row(make_trace(1)))
    made.close()
    with Engine() as one:
        upstream = {"name": "a", "url": one.url, "default_temperature": default}
        with gateway(models=[{"name": "m", "upstreams": [upstream]}], traces={"file": str(path)}) as front:
            for stated in ({}, {"temperature": None}, {"temperature": 0.2}):
                body = {"model": "m", "prompt": "x", "return_token_ids": True, **stated}
                assert front.ask(PATH, json.dumps(body).encode()).status == 200
            wait_until(lambda: recorded(front, "kept") == 3)
    assert [trace.temperature for trace in read_all(path)] == [1.0, default, default, 0.2]
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()
    assert main(["traces", "export", str(path), "--out", str(out)]) == 0
    assert [record.temperature for record in read_traffic(out)] == [
        t for t in (1.0, default, default, 0.2) if t is not None
    ]
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["left_out_temperature"] == (2 if default is None else 0)
    left_out = (
        f"laguna: warning: {path}: 2 of 4 answers left out: their requests state no temperature, and none is known"
    )
    left_out += " of a (2); for answers to come set default_temperature of these upstreams in gateway.toml"
    assert said.err.startswith(left_out) if default is None else said.err == ""
    assert main(["traces", "export", str(path), "--out", str(out), "--format", "full"]) == 0
    assert capsys.readouterr().err == "", "nothing is left out there"
    request = read_all(path)[1].request_id
    assert main(["traces", "show", str(path), request]) == 0
    assert ("temperature not stated" if default is None else "temperature 0.7") in capsys.readouterr().out


def test_answer_that_spans_an_update_says_both_versions_and_is_no_traffic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traces.db"
    weights = {"weight_version": "7", "update": [{"names": ["w"]}]}
    with Engine() as one, gateway(one, traces={"file": str(path)}) as front:
        body = json.dumps({**ASKED, "stream": True, "user": "wait"}).encode()
        with front.connect() as client:
            client.sendall(make_request(PATH, body))
            wait_until(lambda: any(exchange.chunks for exchange in front.relay.exchanges))
            assert front.ask_admin("/admin/update_weights", weights).json()["outcome"] == "updated"
            one._loop.call_soon_threadsafe(one.go_on.set)
            assert not read_reply(client).cut
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 2)
    spanning, plain = read_all(path)
    assert (spanning.weight_versions, plain.weight_versions) == (("default", "7"), ("7",))
    out = tmp_path / "traffic.jsonl"
    assert main(["traces", "export", str(path), "--out", str(out)]) == 0
    record = TrafficRecord(prompt_token_ids=[1, 2, 3], token_ids=[7, 8], temperature=0.7, seed=5, weight_version="7")
    assert list(read_traffic(out)) == [record]
    assert "1 of 2 answers left out: they ran under several versions of the weights\n" in capsys.readouterr().err
    assert main(["traces", "export", str(path), "--format", "full", "--out", str(out)]) == 0
    assert [len(json.loads(line)["token_ids"]) for line in out.read_text().splitlines()] == [3, 2]
    assert main(["traces", "export", str(path), "--weight-version", "7", "--last", "1", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exported"] == 1
    kept = out.read_text()
    for more, message in (
        (["--model", "other"], "expected answers to export over a file that has some, got none; see `laguna"),
        (["--out", str(path)], "--out: expected a file to write, got the one with the traces"),
    ):
        assert main(["traces", "export", str(path), "--out", str(out), *more]) == 2
        assert message in capsys.readouterr().err
    assert (out.read_text(), len(read_all(path))) == (kept, 2), "neither is written over"
    assert main(["traces", "list", str(path), "--last", "9" * 20]) == 0
    shown = capsys.readouterr().out
    assert "default, 7" in shown
    assert json.loads(shown.splitlines()[-1])["answers"] == 2


def test_traces_are_counted_without_their_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "traces.db"
    with Engine() as one, gateway(one, traces={"file": str(path)}) as front:
        for _ in range(3):
            assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 3)
    expected = [
        sum(map(len, found)) for found in zip(*((t.prompt_token_ids, t.token_ids) for t in read_all(path)), strict=True)
    ]
    monkeypatch.setattr(store, "_from_row", None)
    for more, share in (([], 3), (["--last", "1"], 1), (["--model", "other"], 0)):
        assert main(["traces", "list", str(path), *more]) == 0
        counted = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert counted["answers"] == share
        assert [counted["prompt_tokens"] * 3, counted["output_tokens"] * 3] == [tokens * share for tokens in expected]


def test_errors_and_leavers_are_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "traces.db"

    async def fail(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {"message": "x"}}', status="500 No")

    with Engine() as one, gateway(one, traces={"file": str(path)}) as front:
        body = json.dumps({**ASKED, "stream": True, "user": "wait"}).encode()
        with front.connect() as client:
            client.sendall(make_request(PATH, body))
            wait_until(lambda: any(exchange.chunks for exchange in front.relay.exchanges))
        front.wait_idle()
        one.handlers[PATH] = fail
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 500
        one.handlers[PATH] = one.complete
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 1)
    assert len(read_all(path)) == 1


def test_answer_that_cannot_be_kept_keeps_no_later_one_out(tmp_path: Path) -> None:
    """vLLM's to a prompt of one token with echo, logprobs and max_tokens 0: nobody has predicted that token."""
    first = {"index": 0, "prompt_token_ids": [5], "token_ids": [7], "logprobs": {"token_logprobs": [None]}}

    async def echo(exchange: Exchange) -> None:
        await exchange.answer(whole(first))

    with Engine() as one, gateway(one, traces={"file": str(tmp_path / "traces.db")}) as front:
        one.handlers[PATH] = echo
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "no_tokens") == 1)
        assert front.ask(CHAT, json.dumps({**ASKED, "seed": 1 << 63}).encode()).status == 200
        assert front.ask(CHAT, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 1)


@pytest.mark.slow
def test_disk_that_is_full_stops_recording_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    add, full = TraceFile.add, [True]

    def refuse(self: TraceFile, traces: list[Trace]) -> int:
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        return add(self, traces)

    monkeypatch.setattr(TraceFile, "add", refuse)
    with Engine() as one, gateway(one, traces={"file": str(tmp_path / "traces.db")}) as front:
        for count in (1, 2):
            assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
            wait_until(lambda count=count: recorded(front, "failed") == count)  # type: ignore[misc]
        full[0] = False
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 1)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("traces:")]
    assert [line.partition(",")[0] for line in said] == ["traces: expected to write the file", "traces: written again"]


def test_too_much_at_once_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laguna_serve.serving.gateway.traces.recorder.MOST_WAITING_BYTES", 10)
    with Engine() as one, gateway(one, traces={"file": str(tmp_path / "traces.db")}) as front:
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "busy") == 1)


@pytest.mark.parametrize("bound", ["one", "together"])
def test_answer_without_end_is_not_kept_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Neither an answer nor many at once fill the memory, and what was kept of one that is given up is free again."""
    piece, told = b"data: " + b"x" * 1000 + b"\n\n", asyncio.Event()

    async def pour(exchange: Exchange) -> None:
        await exchange.start(SSE)
        for _ in range(100):
            await exchange.chunk(piece)
        await told.wait()
        await exchange.chunk(piece)
        await exchange.end()

    if bound == "one":
        monkeypatch.setattr(recorder, "MOST_BYTES", 50_000)
    else:
        monkeypatch.setattr(copies, "MOST_TOGETHER_BYTES", 50_000)
    outcome = "too_large" if bound == "one" else "busy"
    with (
        Engine() as one,
        gateway(one, traces={"file": str(tmp_path / "traces.db")}) as front,
        front.connect() as client,
    ):
        complete, one.handlers[PATH] = one.handlers[PATH], pour
        client.sendall(make_request(PATH, json.dumps({**ASKED, "stream": True}).encode()))
        wait_until(lambda: recorded(front, outcome) == 1)
        (exchange,) = front.relay.exchanges
        assert front.relay._shadows._copies.held == 0, "while it is still under way"
        assert exchange.copy._data == b""
        one._loop.call_soon_threadsafe(told.set)
        reply = read_reply(client)
        assert (reply.status, reply.cut, reply.body) == (200, False, piece * 101)
        one.handlers[PATH] = complete
        assert front.ask(PATH, json.dumps(ASKED).encode()).status == 200
        wait_until(lambda: recorded(front, "kept") == 1)
        assert recorded(front, outcome) == 1
        assert front.relay._shadows._copies.held == 0


def test_wild_bodies_never_raise_anything_else() -> None:
    rng = random.Random(0)
    sound = whole({"index": 0, "prompt_token_ids": [1], "token_ids": [2], "finish_reason": "stop"})
    for _ in range(2000):
        data = bytearray(rng.choice([sound, stream(json.loads(sound))]))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_answer(bytes(data))
        except AnswerError:
            continue
