"""The check of exact serving, against servers that are exact, or fail in each of the three ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from laguna_serve.serving.engine.batch_invariance import COPIES, PROMPTS, TOKENS, ExactError, check_exact
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.command import build_environment


def answer(body: dict[str, Any], crowded: bool, fault: str) -> dict[str, Any]:
    prompt = body["prompt"]
    if isinstance(prompt, list):
        shift = 1e-7 if fault == "prefill" else 0.0
        steps = [None, *({str(token): {"logprob": -0.25 - token % 7 + shift}} for token in prompt[1:])]
        return {"prompt_logprobs": steps, "token_ids": [0]}
    ids = list(prompt.encode())
    tokens = [len(ids) + i for i in range(body["max_tokens"])]
    if crowded and fault == "tokens":
        tokens[5] += 1
    top = [{f"token_id:{token}": -0.25 - token % 7, "token_id:9999": -9.0} for token in tokens]
    if crowded and fault == "log-probabilities":
        top[3]["token_id:9999"] += 1e-6
    return {"prompt_token_ids": ids, "token_ids": tokens, "logprobs": {"top_logprobs": top}}


@contextmanager
def server(fault: str = "") -> Iterator[str]:
    """An engine; with a fault it errs once eight requests have come one by one."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(self.path)
            if fault == "silence":
                self.send_error(500)
                return
            data = json.dumps({"choices": [answer(body, len(seen) > len(PROMPTS), fault)]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # by default 5, beyond which a busy machine resets connections

    with Server(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def test_exact_engine_passes() -> None:
    with server() as url:
        assert check_exact(url, "m") == TOKENS * len(PROMPTS) * (COPIES + 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tokens", "expected token 5 to be .*, as alone, among 16 requests, got"),
        ("log-probabilities", "the log-probabilities of token 3, among 16 requests, to be those alone"),
        ("prefill", "the log-probability of token 0 to be the same decoded and prefilled"),
        ("silence", "expected the engine to answer the check, got HTTP 500"),
    ],
)
def test_engine_that_depends_on_the_batch_is_refused(fault: str, message: str) -> None:
    with server(fault) as url, pytest.raises(ExactError, match=message):
        check_exact(url, "m")


def test_nobody_listens() -> None:
    with server() as url:
        pass
    with pytest.raises(ExactError, match="expected the engine to answer the check"):
        check_exact(url, "m")


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("cpu", "VLLM_CPU_ATTN_SPLIT_KV", "0"), ("gpu", "VLLM_BATCH_INVARIANT", "1")]
)
def test_exact_asks_for_the_devices_kernels(kind: Any, name: str, value: str) -> None:
    device = Device(kind, "d", 1, 1)
    assert build_environment({}, device, local=True, exact=True)[name] == value
    assert name not in build_environment({}, device, local=True)
