"""Log-probabilities of answers: those of the very steps that committed the tokens, in both APIs, whole and streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from running_diffusion import Running
from tiny_llada import MASK, write_llada

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import PerStep, Reference, step
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor, Slot
from laguna_serve.plugins.diffusion.server.loading import load
from laguna_serve.plugins.diffusion.server.options import parse_options

pytestmark = pytest.mark.slow

SETTINGS = [
    ({}, Reference(cache="dual")),
    ({"tokens_per_step": 3}, Reference(PerStep(3), cache="dual")),
    ({"temperature": 0.8, "seed": 5}, Reference(temperature=0.8, seed=5, cache="dual")),
]
Expected = list[tuple[int, float, dict[int, float]]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_llada(tmp_path_factory.mktemp("toy") / "toy")
    draft = write_llada(tmp_path_factory.mktemp("draft") / "draft", error=0.02)
    flags = [str(folder), "--cache", "dual", "--draft", str(draft), "--draft-policy", "always"]
    with Running(load(parse_options(flags))) as running:
        yield running


def walk(server: Running, prompt: list[int], reference: Reference, length: int = 16, most: int = 3) -> Expected:
    """Of every position its token, its log-probability and the likeliest, step by step without proposals."""
    predictor = Predictor(server.served.decoder.predictor.model)
    predictor.cache = reference.cache
    canvas, slot = Canvas(tuple(prompt), length, 8, MASK), Slot()
    state = canvas.start()
    found: dict[int, tuple[int, float, dict[int, float]]] = {}
    while (block := canvas.find_block(state)) is not None:
        (answers,) = predictor.predict([Ask(canvas, slot, [state])])
        after = step(canvas, reference, state, answers[state])
        for at in [at for at in block if after[at] != state[at]]:
            row = answers[state][at - block.start]
            values = [(value - torch.logsumexp(row, 0)).item() for value in row]
            best = sorted((id_ for id_ in range(len(values)) if id_ != MASK), key=lambda id_: -values[id_])
            found[at] = (after[at], values[after[at]], {id_: values[id_] for id_ in best[:most]})
        state = after
    return [found[at] for at in range(length)]


def read_events(text: str) -> list[dict[str, Any]]:
    return [json.loads(event[6:])["choices"][0] for event in text.split("\n\n")[:-2]]


def check_completion(choices: list[dict[str, Any]], expected: Expected) -> None:
    """Of one whole choice, or of the events of a stream in their order."""
    spoken = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens, values, tops = ([e for s in spoken for e in s[k]] for k in ("tokens", "token_logprobs", "top_logprobs"))
    assert tokens == [f"token_id:{token}" for token, _, _ in expected]
    assert values == pytest.approx([value for _, value, _ in expected], abs=1e-5)
    for top, (token, value, best) in zip(tops, expected, strict=True):
        named = {f"token_id:{id_}": logprob for id_, logprob in (best | {token: value}).items()}
        assert top == pytest.approx(named, abs=1e-5)
        assert next(iter(top)) == f"token_id:{token}"


@pytest.mark.parametrize(("extra", "reference"), SETTINGS)
def test_they_are_of_the_step_that_committed_the_token(
    server: Running, extra: dict[str, Any], reference: Reference
) -> None:
    body: dict[str, Any] = {"prompt": "tell me", "max_tokens": 16, "ignore_eos": True, "logprobs": 3, **extra}
    body["return_tokens_as_token_ids"] = True
    expected = walk(server, server.served.texts.encode("tell me"), reference)
    check_completion(server.http.post("/v1/completions", json=body).json()["choices"], expected)
    check_completion(read_events(server.http.post("/v1/completions", json=body | {"stream": True}).text), expected)


def test_chats_have_them_with_bytes(server: Running) -> None:
    messages = [{"role": "user", "content": "hé"}]
    body = {"messages": messages, "max_tokens": 16, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    ids = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    expected = walk(server, ids, Reference(cache="dual"), most=2)
    whole = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    events = read_events(server.http.post("/v1/chat/completions", json=body | {"stream": True}).text)
    assert [each for event in events for each in (event["logprobs"] or {"content": []})["content"]] == whole
    for each, (token, value, best) in zip(whole, expected, strict=True):
        assert each["token"] == server.served.texts.decode([token], skip_special=False)
        assert bytes(each["bytes"]).decode() == each["token"]
        assert each["logprob"] == pytest.approx(value, abs=1e-5)
        assert [top["logprob"] for top in each["top_logprobs"]] == pytest.approx(list(best.values()), abs=1e-5)
    alone = server.http.post("/v1/chat/completions", json=body | {"top_logprobs": 0}).json()["choices"][0]
    assert all(each["top_logprobs"] == [] for each in alone["logprobs"]["content"])
    without = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8}).json()
    assert without["choices"][0]["logprobs"] is None


def test_a_stop_string_cuts_them_where_it_cuts_the_answer(server: Running) -> None:
    body = {"prompt": "stop here", "max_tokens": 32, "logprobs": 0, "return_token_ids": True}
    stop = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"][3:5]
    for stream in (False, True):
        answer = server.http.post("/v1/completions", json=body | {"stop": stop, "stream": stream})
        choices = read_events(answer.text) if stream else answer.json()["choices"]
        spoken = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        ids = [token for choice in choices for token in choice["token_ids"]]
        texts = [server.served.texts.decode([token], skip_special=False) for token in ids]
        assert [token for each in spoken for token in each["tokens"]] == texts
        offsets = [offset for each in spoken for offset in each["text_offset"]]
        assert offsets == [sum(map(len, texts[:count])) for count in range(len(texts))]
        assert all(len(top) == 1 for each in spoken for top in each["top_logprobs"])
        assert all(-math.inf < value <= 0 for each in spoken for value in each["token_logprobs"])
