"""However an engine cuts its bytes, the client gets the same: random bodies, chunkings and packets (hypothesis)."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laguna_serve.serving.gateway.engines.origin import Origin
from laguna_serve.serving.gateway.wire.failures import BrokenError
from laguna_serve.serving.gateway.wire.http1 import Connection, Waits

TEXT = st.text(max_size=30).map(lambda text: f"data: {text}\n\n".encode())
CHUNKS = st.lists(st.one_of(TEXT, st.binary(min_size=1, max_size=40)), max_size=8)
FRAMED = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


class Told:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.status, self.data, self.end, self.error = 0, [], 0, None  # type: ignore[var-annotated]

    def on_head(self, status: int, headers: object) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        assert self.end == 0
        assert self.error is None
        self.data.append(data)

    def on_pause(self) -> None:
        pass

    def on_end(self) -> None:
        self.end += 1

    def on_error(self, error: OSError) -> None:
        assert self.error is None
        self.error = error


class Wire:
    """A transport without a network."""

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        pass


def receive(packets: list[bytes], *, lost: bool = False) -> tuple[Told, Connection, Origin]:
    async def run() -> tuple[Told, Connection, Origin]:
        origin, told = Origin("http://h:1"), Told()
        connection = Connection(origin)
        connection.connection_made(Wire())  # type: ignore[arg-type]
        connection.request(b"GET / HTTP/1.1\r\n\r\n", told, Waits(60.0, 60.0), bodiless=False)
        for packet in packets:
            if packet:
                connection.data_received(packet)
        if lost:
            connection.connection_lost(None)
        connection._release()
        return told, connection, origin

    return asyncio.run(run())


def frame(chunks: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.mark.slow
@FRAMED
@given(CHUNKS, PLACES)
def test_any_cut_of_the_bytes_gives_the_same_body(chunks: list[bytes], places: list[int]) -> None:
    told, connection, origin = receive(cut(frame(chunks), places))
    assert (told.status, told.end, told.error) == (200, 1, None)
    assert b"".join(told.data) == b"".join(chunks)
    assert connection in origin._idle


@pytest.mark.slow
@FRAMED
@given(CHUNKS)
def test_chunks_that_come_whole_stay_chunks(chunks: list[bytes]) -> None:
    told, _, _ = receive([frame(chunks)])
    assert told.data == chunks


@pytest.mark.slow
@FRAMED
@given(CHUNKS.filter(bool), st.integers(1, 10_000))
def test_body_that_is_cut_off_is_never_complete(chunks: list[bytes], short: int) -> None:
    whole = frame(chunks)
    head = whole.index(b"\r\n\r\n") + 4
    told, connection, origin = receive([whole[: head + short % (len(whole) - head)]], lost=True)
    assert told.end == 0
    assert isinstance(told.error, BrokenError)
    assert b"".join(chunks).startswith(b"".join(told.data))
    assert connection not in origin._idle


@pytest.mark.slow
@FRAMED
@given(st.binary(min_size=1, max_size=200), PLACES)
def test_garbage_ends_in_one_error_or_in_an_answer(data: bytes, places: list[int]) -> None:
    told, _, _ = receive(cut(data, places), lost=True)
    assert told.end + (told.error is not None) == 1


@pytest.mark.slow
@FRAMED
@given(st.binary(max_size=100), PLACES)
def test_body_without_a_length_ends_with_the_connection(body: bytes, places: list[int]) -> None:
    told, connection, origin = receive(cut(b"HTTP/1.1 200 OK\r\n\r\n" + body, places), lost=True)
    assert (told.end, b"".join(told.data)) == (1, body)
    assert connection not in origin._idle


def test_interim_answers_are_passed_over() -> None:
    told, _, _ = receive([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + frame([b"x"])])
    assert (told.status, told.data, told.end) == (200, [b"x"], 1)


def test_what_an_engine_trails_is_not_kept() -> None:
    """There may be any number of it, behind the body."""
    begun = frame([b"{}"])[:-2]
    told, connection, _ = receive([begun, *[b"x-more: 1\r\n"] * 1000])
    assert (told.data, told.end) == ([b"{}"], 0)
    assert connection._headers == [(b"transfer-encoding", b"chunked")]
    told, _, _ = receive([begun, b"x-more: 1\r\n\r\n"])
    assert (told.end, told.error) == (1, None)


def test_what_nobody_asked_for_closes_the_connection() -> None:
    told, connection, _ = receive([frame([b"x"]), b"HTTP/1.1 200 OK\r\n\r\n"])
    assert (told.end, told.data) == (1, [b"x"])
    assert not connection.is_usable()
