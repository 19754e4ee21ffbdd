"""One request never ends the server, and a drafter changes nothing of what comes out, on two engines of vLLM's.

Both are in fp32, where a token's log-probabilities do not hang on its company, and compute long prompts in parts. The
long form of the second half is bench/fuzz.py.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.bench.fuzzing.client import ask_control, check_batch, open_session
from laguna_serve.bench.fuzzing.requests import Request, draw_batches, list_parameters, list_singles
from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.engine import Engine, EngineConfig

TOY = Path(__file__).resolve().parents[2] / "toy"
pytestmark = pytest.mark.vllm

PROMPT, LONG = "def fib(n):\n    if n", "value = value + 1\n" * 120
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}}}
# Greedy, or with a seed: what has one right answer.
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logit_bias": {"logit_bias": {"281": -100, "13": 5, "10": 3}},
    "logit_bias with a penalty": {"logit_bias": {"10": 3, "12": 7}, "repetition_penalty": 1.3},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": [10, 13, 199, 225, 228, 271]},
    "bad_words": {"bad_words": ["self", "return", " n"]},
    "allowed_token_ids": {"allowed_token_ids": [*range(100, 400)]},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.9},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "logprobs": {"logprobs": 3},
    "logprob_token_ids": {"logprobs": 2, "logprob_token_ids": [281, 296]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "echo": {"echo": True, "logprobs": 1},
    "stop": {"stop": [" return"], "include_stop_str_in_output": True},
    "regex": {"structured_outputs": {"regex": "[a-z]{3,9} = [0-9]+"}, "min_tokens": 3},
    "choice": {"structured_outputs": {"choice": ["yes", "no", "maybe so"]}},
    "json": {"structured_outputs": {"json": SCHEMA | {"required": ["a", "b"]}}},
    "beams": {"use_beam_search": True, "n": 2},
    "truncated": {"truncate_prompt_tokens": 4},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3}},
    "cut prompt": {"prompt": LONG},
    "thinking budget": {"prompt": "<think>" + PROMPT, "thinking_token_budget": 9, "skip_special_tokens": False},
    "no budget": {"prompt": "<think>" + PROMPT, "thinking_token_budget": 0, "skip_special_tokens": False},
    "seed": {"temperature": 0.9, "seed": 1},
    "seed with several answers": {"temperature": 0.8, "seed": 5, "n": 3},
    "seed with a cut prompt": {"temperature": 1, "seed": 1, "prompt": LONG},
    "seed with several prompts": {"temperature": 1, "seed": 1, "prompt": [LONG, PROMPT, LONG, "import os"]},
    "seed with top_k": {"temperature": 0.9, "seed": 1, "top_k": 20},
    "seed with top_p": {"temperature": 0.9, "seed": 2, "top_p": 0.8},
    "seed with min_p": {"temperature": 1.1, "seed": 3, "min_p": 0.2},
    "seed with logit_bias": {"temperature": 1, "seed": 3, "logit_bias": {"10": 4}},
    "seed with regex": {"temperature": 1, "seed": 9, "structured_outputs": {"regex": "[a-z]{3,20}"}},
    "seed with all": {"temperature": 1, "seed": 4, "presence_penalty": 1.0, "min_p": 0.05, "top_k": 7, "top_p": 0.9,
                      "bad_words": ["self"], "logit_bias": {"12": 2}, "min_tokens": 9, "logprobs": 1},
}  # fmt: skip
# The share of CI: every so many-th parameter alone, so many drawn batches, and a time after which no more are sent.
SINGLES_EVERY, TOGETHER, DRAWN, MOST_S = 29, 8, 50, 75.0


def start(draft: str | None, log: Path) -> Engine:
    config = EngineConfig(
        model=str(TOY / "teacher"),
        draft=draft,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        chat=ChatOptions(),
        extra_args=("--max-num-batched-tokens", "256"),
    )
    return Engine(config, log_path=log)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with start(None, tmp_path_factory.mktemp("plain") / "log") as engine:
        yield engine


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with start(str(TOY / "dflash"), tmp_path_factory.mktemp("drafted") / "log") as engine:
        yield engine


def complete(engine: Engine, wish: dict[str, Any], route: str = "/v1/completions") -> dict[str, Any]:
    body = {"model": engine.model_name, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
    data = json.dumps(body | wish).encode()
    request = urllib.request.Request(engine.base_url + route, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def view(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client sees of each choice."""
    keys = ("token_ids", "text", "finish_reason", "stop_reason", "logprobs", "prompt_logprobs")
    return [{key: choice.get(key) for key in keys} for choice in answer["choices"]]


def close_to(value: Any) -> Any:
    """Equal but for log-probabilities, whose sums are in another order."""
    if isinstance(value, float):
        return pytest.approx(value, abs=2e-3)
    if isinstance(value, dict):
        return {key: close_to(inner) for key, inner in value.items()}
    return [close_to(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", WISHES)
def test_a_drafter_changes_nothing(plain: Engine, drafted: Engine, name: str) -> None:
    assert view(complete(drafted, WISHES[name])) == close_to(view(complete(plain, WISHES[name])))


@pytest.mark.parametrize("kind", ["plain", "drafted"])
def test_unlike_requests_together_get_what_each_gets_alone(kind: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(kind)
    alone = {name: close_to(view(complete(engine, wish))) for name, wish in WISHES.items()}
    with ThreadPoolExecutor(len(WISHES)) as pool:
        together = dict(zip(WISHES, pool.map(lambda wish: complete(engine, wish), WISHES.values()), strict=True))
    wrong = [name for name in WISHES if view(together[name]) != alone[name]]
    assert wrong == []


@pytest.mark.parametrize("kind", ["plain", "drafted"])
def test_top_k_and_seeds_of_whole_lists_are_answered(kind: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(kind)
    for wish in ({"temperature": 0.7, "top_k": 20}, {"temperature": 1, "seed": 1, "prompt": [LONG] * 6}):
        assert complete(engine, wish)["choices"]
    chat = {"messages": [{"role": "user", "content": "x"}], "prompt": None, "temperature": 0.7, "top_k": 20}
    for route in ("/v1/chat/completions", "/v1/messages"):
        assert complete(engine, chat, route)["usage"]


@pytest.mark.parametrize("schema", [{"type": "array", "minItems": 10**9}, {"type": "object", "minProperties": 10**9}])
def test_a_schema_that_would_fill_the_memory_is_refused(plain: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        complete(plain, {"structured_outputs": {"json": schema}})
    assert refusal.value.code == 400
    assert "at most 100000" in json.load(refusal.value)["error"]["message"]


@pytest.mark.parametrize("kind", ["plain", "drafted"])
def test_whatever_is_sent_is_answered_and_changes_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(kind)
    with urllib.request.urlopen(engine.base_url + "/openapi.json", timeout=60) as response:
        parameters = list_parameters(json.load(response))
    singles = list_singles(parameters, engine.model_name)[::SINGLES_EVERY]
    batches = [singles[place : place + TOGETHER] for place in range(0, len(singles), TOGETHER)]
    drawn = draw_batches(parameters, engine.model_name, seed_value=14, count=DRAWN)
    # Drawn ones first in turn, so that a slow machine, which gets less far, sees something of both.
    mixed = [batch for pair in zip(drawn, batches, strict=False) for batch in pair] + batches[len(drawn) :]

    async def run() -> list[tuple[list[str], list[Request]]]:
        found = []
        deadline = time.monotonic() + MOST_S
        async with open_session() as session:
            control = await ask_control(session, engine.base_url, engine.model_name)
            assert control is not None
            for place, batch in enumerate(mixed):
                if place > TOGETHER and time.monotonic() > deadline:
                    break
                _, wrong = await check_batch(session, engine.base_url, engine.model_name, batch, control)
                if wrong:
                    found.append((wrong, batch))
                if wrong and wrong[0].startswith("death"):
                    break
        return found

    found = asyncio.run(run())
    assert [wrong for wrong, _ in found] == [], found
    engine.check()
