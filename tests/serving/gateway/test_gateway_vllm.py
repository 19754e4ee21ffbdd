"""Through the gateway and straight to a real engine: the same bodies; clients and benchmarks work; it can be paused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest
from gateway_fakes import Gateway, Reply, Upstream, gateway, make_request, read_reply, wait_until
from safetensors.torch import load_file, save_file

from laguna_serve.bench.crosscheck import CrosscheckConfig
from laguna_serve.bench.rate_check.clients import measure_vllm
from laguna_serve.serving.client.routed_experts import decode_experts
from laguna_serve.serving.engine import Engine
from laguna_serve.serving.gateway.engines.engine import Engine as GatewayEngine
from laguna_serve.serving.gateway.engines.weights import WeightGroup

KEY = "authorization: Bearer sk\r\ncontent-type: application/json\r\n"
TOY = Path(__file__).parents[2] / "toy"
pytestmark = pytest.mark.vllm

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Complete:\ndef add(a, b):"}], "temperature": 0}
TEXT = {"model": "m", "prompt": "def add(a, b):\n    ", "temperature": 0, "max_tokens": 24}
LONG = {"max_tokens": 24, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CASES: list[tuple[str, dict[str, Any] | bytes | None]] = [
    ("/v1/models", None),
    ("/version", None),
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}),
    ("/v1/completions", {**TEXT, "n": 3, "logprobs": 3, "prompt_logprobs": 1, "echo": True}),
    ("/v1/completions", {**TEXT, "stream": True, "logprobs": 2, "unknown_vendor_field": {"é": 1}}),
    ("/v1/completions", {**TEXT, "prompt": "", "max_tokens": -1}),
    ("/v1/completions", {**TEXT, "structured_outputs": {"json": SCHEMA}}),
    ("/v1/chat/completions", {**CHAT, **LONG}),
    ("/v1/chat/completions", {**CHAT, **LONG, "stream": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", b'{"model": "m", "messages": [{'),
    ("/v1/messages", {**CHAT, **LONG}),
    ("/v1/messages", {**CHAT, **LONG, "stream": True}),
    ("/v1/responses", {"model": "m", "input": "def f(", "temperature": 0, "max_output_tokens": 8, "store": False}),
    ("/tokenize", {"model": "m", "prompt": "def café(): pass"}),
    ("/detokenize", {"model": "m", "tokens": [10, 20, 30]}),
    ("/inference/v1/generate", {"token_ids": [10, 20, 30], "sampling_params": {"temperature": 0, "max_tokens": 8}}),
    ("/v1/completions", {**TEXT, "n": 8, "temperature": 1.0, "seed": 7, "return_token_ids": True, "priority": 0}),
    ("/v1/nowhere", {"model": "m"}),
    ("/v1/completions", {**TEXT, "routed_experts_prompt_start": 3}),
    ("/v1/completions", {**TEXT, "routed_experts_prompt_start": 99}),
]
# What differs from one request to the next: ids, times, and what is derived from them.
CHANGING = re.compile(
    rb'"((?:[a-z_]*id|request_id|item_id|response_id))":\s*"[^"]*"|"(created|created_at|completed_at)":\s*[0-9.]+'
)


@pytest.fixture(scope="module")
def front(fp32_engine: Engine) -> Any:
    with gateway(Upstream(url=fp32_engine.base_url), model={"name": fp32_engine.model_name}) as found:
        yield found


def ask(port: int, path: str, body: bytes | None) -> Reply:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(make_request(path, body, "content-type: application/json\r\n"))
        return read_reply(connection)


@pytest.mark.parametrize(("path", "body"), CASES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(CASES)])
def test_body_is_the_engines(
    front: Gateway, fp32_engine: Engine, path: str, body: dict[str, Any] | bytes | None
) -> None:
    if isinstance(body, dict):
        body = json.dumps({**body, "model": fp32_engine.model_name}).encode()
    direct_port = urlsplit(fp32_engine.base_url).port or 0
    through_bodies, direct_bodies = set[bytes](), set[bytes]()
    for _ in range(20):
        through, direct = ask(front.port, path, body), ask(direct_port, path, body)
        assert through.status == direct.status
        assert through.header("content-type") == direct.header("content-type")
        through_bodies.add(CHANGING.sub(b"", through.body))
        direct_bodies.add(CHANGING.sub(b"", direct.body))
        if through_bodies & direct_bodies:
            break
        # On a busy machine vLLM itself puts two tokens into one event now and then, on either path.
    assert through_bodies & direct_bodies
    front.wait_idle()


STREAMS = [
    ("/v1/completions", {**TEXT, "stream": True, "logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, **LONG, "stream": True}),
    ("/v1/chat/completions", {**CHAT, **LONG, "stream": True, "stream_options": {"include_usage": False}}),
    ("/v1/messages", {**CHAT, **LONG, "stream": True}),
    ("/v1/responses", {"model": "m", "input": "def f(", "temperature": 0, "max_output_tokens": 8, "stream": True}),
    ("/v1/completions", TEXT),
]


# vLLM has it in a stream's last event, which is that of the usage where one is asked for.
FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"]*"')


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(("path", "body"), STREAMS, ids=[f"{i}-{path}" for i, (path, _) in enumerate(STREAMS)])
def test_stream_under_a_key_is_the_engines_and_its_tokens_are_counted(
    fp32_engine: Engine, path: str, body: dict[str, Any], asks: bool
) -> None:
    """Also with a priority, which vLLM takes without --scheduling-policy priority."""
    key = {"name": "k", "sha256": hashlib.sha256(b"sk").hexdigest(), "tokens_per_day": 100_000, "priority": 5}
    model = {"name": fp32_engine.model_name, "pass_priority": True, "ask_usage": asks}
    dropped = FINGERPRINT if asks else re.compile(b"(?!)")
    data = json.dumps({**body, "model": fp32_engine.model_name}).encode()
    direct_port = urlsplit(fp32_engine.base_url).port or 0
    through_bodies, direct_bodies = set[bytes](), set[bytes]()
    with gateway(Upstream(url=fp32_engine.base_url), model=model, keys=[key]) as front:
        for _ in range(20):
            through, direct = front.ask(path, data, KEY), ask(direct_port, path, data)
            assert (through.status, direct.status) == (200, 200)
            through_bodies.add(dropped.sub(b"", CHANGING.sub(b"", through.body)))
            direct_bodies.add(dropped.sub(b"", CHANGING.sub(b"", direct.body)))
            if through_bodies & direct_bodies:
                break
        assert through_bodies & direct_bodies
        front.wait_idle()
        (tally,) = front.ask_admin("/admin/usage").json()["keys"]["k"]["today"].values()
    each = body.get("max_tokens", body.get("max_output_tokens"))
    assert tally["prompt_tokens"] > 0
    assert 0 < tally["output_tokens"] <= (each + 3) * tally["requests"]
    if asks and path == "/v1/chat/completions":
        assert tally["output_tokens"] == each * tally["requests"]


@pytest.mark.parametrize("start", [0, 7])
def test_routed_experts_come_through_streamed_or_not(front: Gateway, fp32_engine: Engine, start: int) -> None:
    """vLLM streams them in /inference/v1/generate alone: with the last event."""
    prompt, model = list(range(10, 60)), fp32_engine.model_name
    sampling = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
    body = {**sampling, "model": model, "prompt": prompt, "routed_experts_prompt_start": start}
    (choice,) = json.loads(ask(front.port, "/v1/completions", json.dumps(body).encode()).body)["choices"]
    whole = decode_experts(choice["routed_experts"])
    assert whole.shape == (len(prompt) + 16 - 1 - start, 6, 4)

    parameters = {**sampling, "routed_experts_prompt_start": start}
    body = {"model": model, "token_ids": prompt, "sampling_params": parameters, "stream": True}
    events = ask(front.port, "/inference/v1/generate", json.dumps(body).encode()).body.decode().split("\n\n")
    said = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    streamed = [choice["routed_experts"] for event in said for choice in event["choices"] if choice["routed_experts"]]
    assert [decode_experts(text).tolist() for text in streamed] == [whole.tolist()]
    front.wait_idle()


def test_official_clients_work(front: Gateway, fp32_engine: Engine) -> None:
    model = fp32_engine.model_name
    messages: Any = [{"role": "user", "content": "def add(a, b):"}]
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
        stream = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=12, stream=True
        )
        parts = [event.choices[0].delta.content or "" for event in stream]
        assert "".join(parts) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="other", messages=messages)
    with anthropic.Anthropic(base_url=front.url, api_key="none") as other:
        message = other.messages.create(model=model, max_tokens=12, messages=messages)
        assert message.role == "assistant"
    front.wait_idle()


def test_curl_works(front: Gateway, fp32_engine: Engine) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("needs curl")
    body = json.dumps({**TEXT, "model": fp32_engine.model_name, "stream": True})
    command = [curl, "--silent", "--no-buffer", "--fail", f"{front.url}/v1/completions", "--data", body]
    command += ["--header", "content-type: application/json", "--header", "expect: 100-continue"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("data: [DONE]\n\n")
    front.wait_idle()


def test_vllms_benchmark_works(front: Gateway, fp32_engine: Engine, tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(6)))
    config = CrosscheckConfig(url=front.url, model=str(TOY / "teacher"), prompts=dataset, max_tokens=8, concurrency=3)
    assert measure_vllm(config, fp32_engine.model_name, dataset, 6) > 0
    front.wait_idle()


def test_engines_metrics_are_shown(front: Gateway) -> None:
    text = front.ask("/metrics").body.decode()
    assert 'vllm:generation_tokens_total{upstream="a"' in text


def interrupt_stream(front: Gateway, engine: Engine, act: Callable[[], None]) -> tuple[str, str]:
    """A long answer's text, and that of the same one with something done in the middle of it."""
    body = {**TEXT, "model": engine.model_name, "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    whole = ask(front.port, "/v1/completions", data)
    front.wait_idle()  # the next wait is for the second one
    with socket.create_connection(("127.0.0.1", front.port), timeout=60) as connection:
        connection.sendall(make_request("/v1/completions", data, "content-type: application/json\r\n"))
        wait_until(lambda: any(exchange.chunks > 3 for exchange in list(front.relay.exchanges)))
        act()
        held = read_reply(connection)
    front.wait_idle()
    return join_text(whole.body), join_text(held.body)


def join_text(stream: bytes) -> str:
    """What the events of a whole stream say; how vLLM cuts a text into events is another matter."""
    *events, done = [line.removeprefix(b"data: ") for line in stream.splitlines() if line.startswith(b"data: ")]
    assert done == b"[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_paused_engine_goes_on_where_it_was(front: Gateway, fp32_engine: Engine) -> None:
    def pause() -> None:
        assert front.ask_admin("/pause?mode=keep", {}).status == 200
        assert front.ask_admin("/is_paused").json() == {"a": {"is_paused": True}}
        assert front.relay.exchanges, "it is held in the middle"
        assert front.ask_admin("/resume", {}).status == 200

    whole, held = interrupt_stream(front, fp32_engine, pause)
    assert held == whole


def test_stream_that_gets_the_same_weights_anew_goes_on_where_it_was(
    front: Gateway, fp32_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, verify = list[int](), WeightGroup.verify

    async def watch(group: WeightGroup, engines: Sequence[GatewayEngine], version: str) -> None:
        """While the engines have the weights and have not gone on: the answer may end before the update's does."""
        under_way.append(len(front.relay.exchanges))
        await verify(group, engines, version)

    def update() -> None:
        weights = {"weight_version": "same", "update": [{"folder": str(TOY / "teacher")}], "mode": "keep"}
        assert front.ask_admin("/admin/update_weights", weights).json()["outcome"] == "updated"

    monkeypatch.setattr(WeightGroup, "verify", watch)
    whole, held = interrupt_stream(front, fp32_engine, update)
    assert held == whole
    assert under_way == [1], "it was held in the middle"


def test_version_of_the_weights_is_the_engines(front: Gateway, fp32_engine: Engine) -> None:
    body = json.dumps({**TEXT, "model": fp32_engine.model_name}).encode()
    before = ask(front.port, "/v1/completions", body)
    assert before.header("x-weight-version") not in (None, "step-7")
    reply = front.ask_admin("/admin/update_weights", {"weight_version": "step-7", "mode": "wait"})
    assert (reply.status, reply.json()["outcome"]) == (200, "updated")
    after = ask(front.port, "/v1/completions", body)
    assert after.header("x-weight-version") == "step-7"
    assert front.ask_admin("/weight_info").json() == {"a": {"weight_version": "step-7"}}
    assert CHANGING.sub(b"", after.body) == CHANGING.sub(b"", before.body)


def say(front: Gateway, model: str) -> tuple[str, str]:
    """What is said to a fixed prompt, and by which version."""
    reply = ask(front.port, "/v1/completions", json.dumps({**TEXT, "model": model}).encode())
    return reply.json()["choices"][0]["text"], reply.header("x-weight-version") or ""


def test_new_weights_are_served_and_a_broken_version_is_not(
    front: Gateway, fp32_engine: Engine, tmp_path: Path
) -> None:
    new, broken = tmp_path / "new", tmp_path / "broken"
    for folder in (new, broken):
        folder.mkdir()
    tensors = load_file(TOY / "teacher" / "model.safetensors")
    save_file({name: -t if "o_proj" in name else t for name, t in tensors.items()}, new / "model.safetensors")
    data = (new / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])

    def update(version: str, folder: Path, fall_back: Path) -> tuple[int, str]:
        body = {"weight_version": version, "update": [{"folder": str(folder)}], "mode": "wait"}
        reply = front.ask_admin("/admin/update_weights", {**body, "rollback": {"update": [{"folder": str(fall_back)}]}})
        return reply.status, reply.json()["outcome"]

    model = fp32_engine.model_name
    old_text, old_version = say(front, model)
    assert update("new", new, TOY / "teacher") == (200, "updated")
    new_text, version = say(front, model)
    assert (new_text == old_text, version) == (False, "new")
    assert update("broken", broken, new) == (502, "rolled_back")
    assert say(front, model) == (new_text, "new")
    assert update(old_version, TOY / "teacher", new) == (200, "updated")
    assert say(front, model) == (old_text, old_version)


def test_update_that_was_never_finished_does_not_block_the_next(front: Gateway, fp32_engine: Engine) -> None:
    for path in ("/pause?mode=keep", "/start_weight_update", "/resume"):
        assert front.ask_admin(path, {}).status == 200
    assert ask(front.port, "/v1/completions", b"{}").status == 503
    version = front.relay.pools[fp32_engine.model_name].versions[0].decode()
    weights = {"weight_version": version, "update": [{"folder": str(TOY / "teacher")}]}
    assert front.ask_admin("/admin/update_weights", weights).json()["outcome"] == "updated"
    assert say(front, fp32_engine.model_name)[1] == version


def test_update_that_the_engine_cannot_do_is_told(fp32_engine: Engine) -> None:
    """With nothing to fall back to, the model is not served with weights that may be broken."""
    with gateway(Upstream(url=fp32_engine.base_url), model={"name": fp32_engine.model_name}) as front:
        reply = front.ask_admin("/admin/update_weights", {"weight_version": "step-8", "update": [{"names": []}]})
        assert (reply.status, reply.json()["outcome"]) == (502, "unavailable")
        assert "/update_weights" in reply.json()["error"]
        assert ask(front.port, "/v1/completions", b"{}").status == 503
        reply = front.ask_admin("/admin/update_weights", {"weight_version": "default"})
        assert (reply.status, reply.json()["outcome"]) == (502, "unchanged"), "a new name fixes nothing"
