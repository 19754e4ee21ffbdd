"""laguna serve with a LLaDA: clients complete, stream and chat through the gateway; deaths are survived, ends clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import psutil
import pytest
from openai import APIStatusError, OpenAI
from serving_fakes import serving, wait_until_gone
from test_service import Stream, read_until, stop
from tiny_llada import MASK, write_llada

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.server.loading import load
from laguna_serve.plugins.diffusion.server.options import parse_options
from laguna_serve.plugins.diffusion.speculation import Decoder
from laguna_serve.serving.client.exposition import read_samples
from laguna_serve.serving.engine import find_port
from laguna_serve.serving.speculation.acceptance import read_acceptance

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "hello"}]
DUAL = ("--", "--cache", "dual", "--block-length", "8")


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada") / "llada")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada") / "draft", error=0.02)


def find_engine(server: subprocess.Popen[str]) -> psutil.Process:
    """The engine's process."""
    children = psutil.Process(server.pid).children(recursive=True)
    (engine,) = [
        child
        for child in children
        if "laguna_serve.plugins.diffusion.server" in child.cmdline()
        and "laguna_serve.serving.supervision.reaper" not in child.cmdline()
    ]
    return engine


def read_greeting(server: subprocess.Popen[str]) -> str:
    """The URL; the rest of the greeting is read, too."""
    assert server.stdout is not None
    url = server.stdout.readline().split()[3].removesuffix("/v1")
    while not (line := server.stdout.readline()).startswith("try: curl"):
        pass
    assert "/v1/chat/completions" in line
    return url


def decode(folder: Path, prompt: list[int] | str, length: int) -> str:
    """The offline reference's text."""
    served = load(parse_options([str(folder), "--cache", "dual"]))
    ids = served.texts.encode(prompt) if isinstance(prompt, str) else prompt
    decoder = Decoder(Predictor(served.decoder.predictor.model), Reference(cache="dual"), served.stop)
    (run,) = decoder.decode([Canvas(tuple(ids), length, 8, MASK)])
    return served.texts.decode([token for token in run.read_answer() if token not in served.stop])


def leave_a_stream(url: str) -> None:
    """Begin a long answer, and leave with the first event of it."""
    body = {"model": "llada", "messages": CHAT, "max_tokens": 208, "block_length": 208, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def wait_until_idle(engine_url: str) -> None:
    """Until no request runs or waits, of which one was aborted."""
    deadline = time.monotonic() + 60
    while True:
        samples = read_samples(httpx.get(f"{engine_url}/metrics", trust_env=False).text)
        busy = sum(s.value for s in samples if s.name.startswith("vllm:num_requests_"))
        aborted = [
            s.value for s in samples if s.name.endswith("s_total") and s.labels.get("finished_reason") == "abort"
        ]
        if not busy and aborted == [1.0]:
            return
        assert time.monotonic() < deadline, aborted
        time.sleep(0.05)


def test_clients_through_the_gateway(llada: Path, draft: Path, tmp_path: Path) -> None:
    flags = ("--draft", str(draft), "--gamma", "3", "--max-num-seqs", "4", *DUAL, "--draft-policy", "always")
    with serving(llada, tmp_path, *flags) as server:
        url = read_greeting(server)
        with httpx.Client(trust_env=False, timeout=60) as http:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0)
            expected = decode(llada, "once", 24)
            whole = client.completions.create(model="llada", prompt="once", max_tokens=24)
            assert whole.choices[0].text == expected
            chunks = list(client.completions.create(model="llada", prompt="once", max_tokens=24, stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == expected
            tokens = http.post(f"{url}/tokenize", json={"model": "llada", "messages": CHAT}).json()["tokens"]
            chat = client.chat.completions.create(model="llada", messages=CHAT, max_tokens=16)  # type: ignore[call-overload]
            assert chat.choices[0].message.content == decode(llada, tokens, 16)
            events = list(client.chat.completions.create(model="llada", messages=CHAT, max_tokens=16, stream=True))  # type: ignore[call-overload]
            said = "".join(event.choices[0].delta.content or "" for event in events)
            assert said == chat.choices[0].message.content
            with pytest.raises(APIStatusError, match="top_p: expected none") as caught:
                client.completions.create(model="llada", prompt="once", top_p=0.5)
            assert caught.value.status_code == 400
            assert [card.id for card in client.models.list()] == ["llada"]
            leave_a_stream(url)
        engine = find_engine(server)
        port = engine.cmdline()[engine.cmdline().index("--port") + 1]
        acceptance = read_acceptance(f"http://127.0.0.1:{port}")
        assert acceptance is not None
        assert acceptance.accepted > 0
        wait_until_idle(f"http://127.0.0.1:{port}")
        result, err = stop(server)
    assert (result["outcome"], result["restarts"]) == ("stopped", 0)
    assert "loading weights" in err or "ready at" in err
    wait_until_gone([engine.pid], timeout_s=0)


def test_a_death_is_survived(llada: Path, tmp_path: Path) -> None:
    with serving(llada, tmp_path, *DUAL) as server:
        url = read_greeting(server)
        body = {"model": "llada", "prompt": "on", "max_tokens": 240, "block_length": 240, "ignore_eos": True}
        stream = Stream(url, body={**body, "stream": True})
        os.kill(find_engine(server).pid, signal.SIGKILL)
        read_until(server, "starting it again in 1 s (failure 1 of 5 in a row)")
        read_until(server, "serving again, restart 1")
        *_, error, done = stream.read_end()
        assert done == "data: [DONE]"
        assert "error" in error
        request = {"model": "llada", "prompt": "once", "max_tokens": 8}
        with httpx.Client(trust_env=False, timeout=60) as http:
            answer = http.post(f"{url}/v1/completions", json=request).json()
        assert answer["choices"][0]["text"] == decode(llada, "once", 8)
        assert stop(server)[0]["restarts"] == 1


def test_without_the_gateway_and_with_a_key(llada: Path, tmp_path: Path) -> None:
    with serving(llada, tmp_path, "--no-gateway", "--api-key", "secret", *DUAL) as server:
        url = read_greeting(server)
        with httpx.Client(trust_env=False, timeout=60) as http:
            assert http.get(f"{url}/v1/models").status_code == 401
            card = http.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).json()["data"][0]
        assert (card["id"], card["max_model_len"]) == ("llada", 256)
        result, _ = stop(server)
    assert result["outcome"] == "stopped"


def test_requests_in_flight_finish_on_sigterm(llada: Path, tmp_path: Path) -> None:
    """The bare server, as a supervisor ends it: what streams goes on to its end, then the process ends with 0."""
    port = find_port("127.0.0.1")
    command = [sys.executable, "-m", "laguna_serve.plugins.diffusion.server", str(llada), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            body = {"prompt": "on", "max_tokens": 96, "block_length": 8, "ignore_eos": True, "stream": True}
            stream = Stream(f"http://127.0.0.1:{port}", body=body)
            server.send_signal(signal.SIGTERM)
            *_, last, done = stream.read_end()
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert server.wait(60) == 0
        finally:
            server.kill()
