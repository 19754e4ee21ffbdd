"""The HTTP server: what it says is the offline reference's, in OpenAI's forms, and what it cannot do is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError
from running_diffusion import TIMEOUT_S, Running
from tiny_llada import MASK, VOCABULARY, write_llada

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Evenly, PerStep, Reference, Threshold
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.server.bodies import ChatMessage
from laguna_serve.plugins.diffusion.server.choices import choose_length
from laguna_serve.plugins.diffusion.server.loading import load
from laguna_serve.plugins.diffusion.server.options import parse_options

CHAT = [{"role": "user", "content": "hello"}]
MESSAGES = [ChatMessage(role="user", content="hello")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    draft = write_llada(tmp_path_factory.mktemp("draft") / "draft", error=0.02)
    with Running(
        load(parse_options([str(folder), "--cache", "dual", "--draft", str(draft), "--draft-policy", "always"]))
    ) as running:
        yield running


@contextmanager
def own_server(folder: Path, *flags: str, **changes: Any) -> Iterator[Running]:
    with Running(load(parse_options([str(folder), *flags])), **changes) as running:
        yield running


@pytest.mark.parametrize(
    ("asked", "limit", "usual", "expected"),
    [
        (None, None, 128, 128),
        (None, None, 20, 24),  # in whole blocks
        (None, 9, 128, 16),
        (None, None, 0, 8),  # the prompt leaves no room, which is refused with a block's length
        (16, None, 128, 16),
    ],
)
def test_canvas_is_what_is_asked_for_or_usual(asked: int | None, limit: int | None, usual: int, expected: int) -> None:
    assert choose_length(asked, limit, 8, usual) == expected


SETTINGS: list[tuple[dict[str, Any], int, Reference, int]] = [
    ({}, 16, Reference(cache="dual"), 8),
    ({"block_length": 4, "steps": 8}, 16, Reference(Evenly(2), cache="dual"), 4),
    ({"tokens_per_step": 3, "canvas_length": 24}, 24, Reference(PerStep(3), cache="dual"), 8),
    ({"threshold": 0.3}, 16, Reference(Threshold(0.3), cache="dual"), 8),
    ({"temperature": 0.8, "seed": 5}, 16, Reference(temperature=0.8, seed=5, cache="dual"), 8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "length", "reference", "block"), SETTINGS)
def test_texts_are_the_offline_references(
    server: Running, extra: dict[str, Any], length: int, reference: Reference, block: int
) -> None:
    body = {"prompt": "tell me", "max_tokens": 16, "return_token_ids": True, **extra}
    answer = server.http.post("/v1/completions", json=body).json()
    prompt = server.served.texts.encode("tell me")
    expected = server.decode(prompt, length, reference, block)[:16]
    choice = answer["choices"][0]
    assert choice["token_ids"] == expected
    assert choice["text"] == server.say(expected)
    assert choice["prompt_token_ids"] == prompt
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(expected),
        "total_tokens": len(prompt) + len(expected),
    }


@pytest.mark.slow
def test_clients_complete_stream_and_chat(server: Running) -> None:
    client, texts = server.client, server.served.texts
    whole = client.completions.create(model="toy", prompt="once", max_tokens=24)
    expected = server.decode(texts.encode("once"), 24, Reference(cache="dual"))
    assert whole.choices[0].text == server.say(expected)
    assert whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(
        client.completions.create(
            model="toy", prompt="once", max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    ids = texts.render_chat(MESSAGES, prompt_for_answer=True, kwargs={})
    chat = client.chat.completions.create(model="toy", messages=CHAT, max_completion_tokens=16)  # type: ignore[call-overload]
    assert chat.choices[0].message.content == server.say(server.decode(ids, 16, Reference(cache="dual")))
    events = list(client.chat.completions.create(model="toy", messages=CHAT, max_tokens=16, stream=True))  # type: ignore[call-overload]
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == chat.choices[0].message.content
    assert [event.choices[0].finish_reason for event in events][-1] == chat.choices[0].finish_reason


@pytest.mark.slow
def test_canvas_is_shorter_where_the_prompt_leaves_less_room(server: Running) -> None:
    """The usual canvas is 32 tokens here, a block 8, the context 256."""
    body = {"prompt": [5] * 235, "ignore_eos": True}
    answer = server.http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 16
    refused = server.http.post("/v1/completions", json={**body, "prompt": [5] * 250})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.slow
def test_text_does_not_depend_on_the_other_prompts_of_its_list(server: Running) -> None:
    """Nor does its canvas, which a longer prompt beside it made shorter."""
    body = {"ignore_eos": True, "return_token_ids": True}
    alone = server.http.post("/v1/completions", json={**body, "prompt": [5, 6]}).json()
    beside = server.http.post("/v1/completions", json={**body, "prompt": [[5, 6], [5] * 235]}).json()
    assert beside["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    assert [len(choice["token_ids"]) for choice in beside["choices"]] == [32, 16]


@pytest.mark.slow
def test_prompts_ids_stand_where_vllm_has_them(server: Running) -> None:
    """So that traces can be made of streams, and both arms of a benchmark be held against each other."""
    asked = {"max_tokens": 8, "return_token_ids": True}
    whole = server.http.post("/v1/chat/completions", json={**asked, "messages": CHAT}).json()
    assert whole["prompt_token_ids"]
    assert "prompt_token_ids" not in whole["choices"][0]
    text = server.http.post("/v1/chat/completions", json={**asked, "messages": CHAT, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    assert [event.get("prompt_token_ids") for event in events] == [whole["prompt_token_ids"]] + [None] * (
        len(events) - 1
    )
    text = server.http.post("/v1/completions", json={**asked, "prompt": [[5, 6], [7]], "stream": True}).text
    choices = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n")[:-2]]
    for index, prompt in enumerate(([5, 6], [7])):
        told = [choice.get("prompt_token_ids") for choice in choices if choice["index"] == index]
        assert told == [prompt] + [None] * (len(told) - 1)


@pytest.mark.slow
def test_answer_that_a_string_ends_is_no_abort(folder: Path) -> None:
    with own_server(folder) as server:
        body = {"prompt": "tell me", "max_tokens": 64, "ignore_eos": True}
        text = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        stopped = server.http.post("/v1/completions", json={**body, "stop": [text[2:4]]}).json()["choices"][0]
        assert stopped["finish_reason"] == "stop"

        def count() -> dict[str, float]:
            lines = server.http.get("/metrics").text.splitlines()
            found = [line for line in lines if "request_success_total{" in line]
            return {line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1]) for line in found}

        server.wait(lambda: sum(count().values()) == 2)
        assert count()["stop"] + count()["length"] == 2  # it may have come to its end before the string was seen


@pytest.mark.slow
def test_logits_are_kept_for_proposals_alone(server: Running, folder: Path) -> None:
    assert server.served.decoder.keeps
    with own_server(folder) as plain:
        assert not plain.served.decoder.keeps
        run = plain.served.decoder.begin(Canvas((5, 6), 16, 8, MASK))
        plain.served.decoder.advance([run])
        assert run.last is None


@pytest.mark.slow
def test_a_crowd_of_streams(server: Running) -> None:
    """Sixteen unlike requests at once, each token for token as offline."""

    def ask(number: int) -> list[int]:
        body = {"prompt": f"number {number}", "max_tokens": 8 + number, "stream": True, "return_token_ids": True}
        body |= {"block_length": 4 if number % 2 else 8, "temperature": 0.7 * (number % 3), "seed": number}
        text = server.http.post("/v1/completions", json=body).text
        events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
        return [token for event in events for token in event["choices"][0]["token_ids"]]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for number, answer in enumerate(answers):
        block, length = 4 if number % 2 else 8, 8 + number
        reference = Reference(temperature=0.7 * (number % 3), seed=number if number % 3 else 0, cache="dual")
        prompt = server.served.texts.encode(f"number {number}")
        assert answer == server.decode(prompt, -(-length // block) * block, reference, block)[:length]


@pytest.mark.slow
def test_several_prompts_and_choices(server: Running) -> None:
    texts = server.served.texts
    answer = server.client.completions.create(
        model="toy", prompt=["one", "two"], max_tokens=8, n=2, temperature=0.9, seed=3
    )
    expected = [
        server.say(server.decode(texts.encode(prompt), 8, Reference(temperature=0.9, seed=seed, cache="dual")))
        for prompt in ("one", "two")
        for seed in (3, 4)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6


def test_stop_strings_and_ids(server: Running) -> None:
    ids = server.served.texts.encode("stop here")
    said = server.decode(ids, 32, Reference(cache="dual"))
    text = server.say(said)
    stop = text[3:5]
    for stream in (False, True):
        body = {"prompt": ids, "max_tokens": 32, "stop": stop, "stream": stream}
        answer = server.http.post("/v1/completions", json=body)
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            got = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            end = chunks[-1]["choices"][0]
        else:
            end = answer.json()["choices"][0]
            got = end["text"]
            assert answer.json()["usage"]["completion_tokens"] == text.index(stop) + len(stop)
        assert got == text[: text.index(stop)]
        assert (end["finish_reason"], end["stop_reason"]) == ("stop", stop)
    body = {"prompt": ids, "max_tokens": 32, "stop_token_ids": [said[4]]}
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", said[4])
    assert choice["text"] == server.say(said[: said.index(said[4])])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than"),
    ("completions", {"prompt": "a", "logprobs": True}, "logprobs: Input should be a valid integer"),
    ("completions", {"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs: expected none"),
    ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs: expected logprobs beside it"),
    ("completions", {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty: expected none"),
    ("completions", {"prompt": "a", "top_p": 0.9}, "top_p: expected none"),
    ("completions", {"prompt": "a", "echo": True}, "echo: expected none"),
    ("completions", {"prompt": "a", "structured_outputs": {"choice": ["a"]}}, "structured_outputs: expected none"),
    ("completions", {"prompt": "a", "n": 2}, "n: expected 1 at temperature 0"),
    ("completions", {"prompt": "a", "blok_length": 2}, "blok_length: expected a field that is served here"),
    ("completions", {"prompt": "a", "steps": 5, "max_tokens": 16}, "steps: expected as many for every block"),
    ("completions", {"prompt": "a", "steps": 4, "threshold": 0.5}, "threshold: expected one schedule"),
    ("completions", {"prompt": "a", "canvas_length": 12}, "canvas_length: expected whole blocks"),
    ("completions", {"prompt": "a", "canvas_length": 8, "max_tokens": 9}, "canvas_length: expected max_tokens"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens: Input should be greater"),
    ("completions", {"prompt": "a", "max_tokens": 300}, "max_tokens: expected at most 256 tokens"),
    ("completions", {"prompt": []}, "prompt: expected a text or ids"),
    ("completions", {"prompt": ""}, "prompt: expected at least one token"),
    ("completions", {"prompt": [7, MASK]}, "prompt: expected no mask"),
    ("completions", {"prompt": [VOCABULARY]}, "prompt: expected ids from 0"),
    ("completions", {"prompt": "a", "stop": [""]}, "stop: expected strings"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options: expected only"),
    ("completions", {}, "prompt: Field required"),
    ("completions", {"prompt": "a\ud800b"}, r"body: expected whole characters, got \ud800 alone"),
    ("completions", {"prompt": "a", "model": "\udfff"}, "body: expected whole characters"),
    ("completions", {"prompt": ["a"] * 1100}, "prompt: expected at most 72 answers at once, got 1100"),
    ("chat/completions", {"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}},
     "chat_template_kwargs: expected no chat_template"),
    ("chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, "tools: expected none"),
    ("chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format: expected"),
    ("chat/completions", {"messages": []}, "messages: List should have at least 1"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages.0.content.0.type: Input should be 'text' or 'input_text'",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "assistant", "content": None}]},
        "messages.0.content: Input should be a valid string or a valid list",
    ),
    ("completions", {"prompt": [None]}, "prompt.0: Input should be a valid integer or a valid string or a valid list"),
    ("completions", {"prompt": "a", "temperature": 1e308}, "temperature: Input should be less than or equal to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_in_a_line(
    server: Running, path: str, body: dict[str, Any], message: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = server.http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]


def test_neutral_and_advisory_fields_are_taken(server: Running) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 8,
        "top_p": 1.0,
        "top_k": -1,
        "presence_penalty": 0,
        "tools": None,
        "tool_choice": "none",
        "logprobs": False,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "n": 1,
        "response_format": {"type": "text"},
    }
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_other_errors_are_openais(server: Running) -> None:
    with pytest.raises(APIStatusError) as caught:
        server.client.completions.create(model="other", prompt="a")
    assert caught.value.status_code == 404
    answer = server.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("body: expected JSON")
    assert server.http.get("/v1/nothing").json()["error"]["code"] == 404


def test_models_tokens_health_and_metrics(server: Running) -> None:
    card = server.client.models.list().data[0]
    assert (card.id, card.model_extra["max_model_len"]) == ("toy", 256)  # type: ignore[index]
    tokens = server.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert tokens["count"] == 3
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
    chat = server.http.post("/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == server.served.texts.render_chat(MESSAGES, prompt_for_answer=True, kwargs={})
    assert server.http.post("/tokenize", json={}).status_code == 400
    assert server.http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    assert server.http.get("/health").status_code == 200
    text = server.http.get("/metrics").text
    for name in ("num_requests_running", "generation_tokens_total", "spec_decode_num_drafts_total"):
        assert f'vllm:{name}{{engine="0",model_name="toy"}}' in text


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(folder: Path, stream: bool) -> None:
    with own_server(folder, running=2) as server:
        body = {"prompt": "go on", "max_tokens": 240, "block_length": 240, "ignore_eos": True, "stream": stream}
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as leaving:
            if stream:
                with leaving.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    server.wait(lambda: server.read("num_requests_running") == 1)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaving.post("/v1/completions", json=body, timeout=0.2)
        server.wait(lambda: server.read("num_requests_running") == 0)
        labels = {"model_name": "toy", "engine": "0", "finished_reason": "abort"}
        ended = server.engine.metrics.registry.get_sample_value("vllm:request_success_total", labels)
        assert ended == 1.0


@pytest.mark.slow
def test_a_full_queue_and_a_dead_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server(folder, running=1, waiting=0) as server:
        body = {"prompt": "a", "max_tokens": 240, "block_length": 240, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body):
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 8}, trust_env=False)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["message"].startswith("engine: expected at most 0 requests to wait")

    def failing(*_: object) -> None:
        raise MemoryError("nothing is left")

    with own_server(folder) as server:
        monkeypatch.setattr("laguna_serve.plugins.diffusion.engine.batch.MAX_FAILED", 1)
        monkeypatch.setattr(Predictor, "predict", failing)
        answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "engine: MemoryError: nothing is left"
        assert server.engine.join(TIMEOUT_S)
        assert server.http.get("/health").status_code == 503
        assert server.http.post("/v1/completions", json={"prompt": "a"}).status_code == 503


def test_a_stream_that_fails_ends_with_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Predictor, "predict", failing)
    with own_server(folder) as server:
        body = {"prompt": "a", "max_tokens": 8, "stream": True}
        lines = server.http.post("/v1/completions", json=body).text.split("\n\n")
        assert json.loads(lines[-3][6:])["error"]["message"] == "engine: RuntimeError: no such luck"
        assert lines[-2] == "data: [DONE]"


def test_a_defect_is_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    with own_server(folder) as server:
        monkeypatch.setattr("laguna_serve.plugins.diffusion.server.app.make_requests", failing)
        answer = server.http.post("/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "server: RuntimeError")


def test_keys_and_origins(folder: Path) -> None:
    with own_server(folder, key="secret") as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.http.get("/health").status_code == 200
        answer = server.http.get("/health", headers={"Origin": "https://page.example"})
        assert answer.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.slow
def test_a_servers_seed_gives_draws_that_can_be_repeated(folder: Path) -> None:
    body = {"prompt": "tell me", "max_tokens": 16, "temperature": 1.0, "return_token_ids": True}
    said = []
    for _ in range(2):
        with Running(load(parse_options([str(folder)])), seed=7) as server:
            said.append([server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(3)])
    assert said[0] == said[1]
    assert len(set(said[0])) == 3
