"""The event-stream parser gives the same events however the bytes are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.serving.client.records import RawStream, decode_stream
from laguna_serve.serving.client.sse import SseParser


def parse(chunks: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b": ping\n\ndata: a\n: ping\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\r\n\r\ndata: b\r\r", [b"a", b"b"]),
        (b"\n\n\n", []),
        (b"data: never closed\n", []),
        (b"data\n\n", []),
    ],
    ids=[
        "two",
        "no-space",
        "two-spaces",
        "comments",
        "other-fields",
        "two-lines",
        "crlf-and-cr",
        "blank",
        "open",
        "bare",
    ],
)
def test_the_event_stream_grammar(body: bytes, events: list[bytes]) -> None:
    assert parse([body]) == events
    assert parse([body[i : i + 1] for i in range(len(body))]) == events


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    texts=st.lists(TEXT, min_size=1, max_size=6),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    places=st.lists(st.integers(0, 10_000), max_size=12),
    comment=st.booleans(),
)
def test_any_cut_gives_the_same_texts(texts: list[str], ending: str, places: list[int], comment: bool) -> None:
    lead = f": ping{ending}" if comment else ""
    body = "".join(f"{lead}data: {json.dumps({'t': t}, ensure_ascii=False)}{ending}{ending}" for t in texts).encode()
    assert [json.loads(event)["t"] for event in parse(cut(body, places))] == texts


@given(chunks=st.lists(st.binary(max_size=20), max_size=10))
def test_garbage_never_raises(chunks: list[bytes]) -> None:
    assert parse(chunks) == parse([b"".join(chunks)])
    reads = [(index, chunk) for index, chunk in enumerate(chunks)]
    assert decode_stream(RawStream("p", 0, 9, reads)).error is not None


@pytest.mark.parametrize(
    "event",
    [b"[]", b"3", b'{"choices": 3}', b'{"choices": [3]}', b'{"choices": [{"token_ids": 3}]}', b'{"usage": 3}', b"\xff"],
)
def test_an_event_of_another_shape_is_an_error_not_a_crash(event: bytes) -> None:
    record = decode_stream(RawStream("p", 0, 9, [(1, b"data: " + event + b"\n\ndata: [DONE]\n\n")]))
    assert record.error is not None


def test_a_chunk_counts_from_its_closing_line() -> None:
    event = b'data: {"choices": [{"text": "\xc3\xa9", "token_ids": [5, 6]}]}\n\n'
    raw = RawStream("p", 100, 500, [(200, event[:30]), (300, event[30:]), (400, b"data: [DONE]\n\n")])
    record = decode_stream(raw)
    assert record.error is None
    assert (record.chunk_ns, record.chunk_tokens, record.token_ids) == ([300], [2], [5, 6])
    assert record.text_bytes == "é".encode()


def test_line_end_behind_a_cut_cr_lf_counts() -> None:
    assert parse([b"data: a\r", b"\n", b"\n"]) == [b"a"]
