"""The acceptance length read from an engine's metrics, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from laguna_serve.serving.speculation.acceptance import Acceptance, format_acceptance, read_acceptance

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="teacher"}} {drafts}
vllm:spec_decode_num_drafts_created{{engine="0",model_name="teacher"}} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="teacher"}} 1400.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="teacher"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="teacher",position="0"}} 180.0
"""


@pytest.fixture
def serve() -> Iterator[Callable[[int, str], str]]:
    """serve(status, text) → the address of a server that answers so."""
    servers = []

    def start(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_counters_of_all_engines_are_added(serve: Callable[[int, str], str]) -> None:
    one = METRICS.format(drafts="200.0", accepted="660.0")
    assert read_acceptance(serve(200, one)) == Acceptance(200, 660)
    two = one + one.replace('engine="0"', 'engine="1"').replace("660.0", "1.2e+03")
    assert read_acceptance(serve(200, two)) == Acceptance(400, 1860)


@pytest.mark.parametrize("text", ["", "vllm:num_requests_running 1.0\n", "\x00\xff<html>"])
def test_engine_without_speculation_has_none(serve: Callable[[int, str], str], text: str) -> None:
    assert read_acceptance(serve(200, text)) is None


def test_engine_that_does_not_answer_has_none(serve: Callable[[int, str], str]) -> None:
    assert read_acceptance(serve(503, METRICS)) is None
    assert read_acceptance("http://127.0.0.1:9") is None


def test_a_proxy_is_not_asked(serve: Callable[[int, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(200, METRICS.format(drafts="200.0", accepted="660.0"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert read_acceptance(url) == Acceptance(200, 660)


def test_length() -> None:
    assert Acceptance(200, 660).length == pytest.approx(4.3)
    assert Acceptance(0, 0).length is None


def test_line_advises_where_speculation_loses() -> None:
    good = format_acceptance(Acceptance(1200, 3960), 7)
    assert good == "acceptance: 4.30 tokens per step (at most 8), over 1,200 drafts"
    assert "compare with bench/ab.py" in format_acceptance(Acceptance(1000, 300), 7)
