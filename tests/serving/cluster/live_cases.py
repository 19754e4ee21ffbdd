"""One live replica on a Ray of this machine, asked by OpenAI's client; run in .venv-ray by test_cluster.py."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from laguna_serve.bench.cluster.load import Asker
from laguna_serve.bench.cluster.local import Application, count_left, list_descendants, local_cluster
from laguna_serve.bench.cluster.phases import Bench, kill_replica
from laguna_serve.serving.engine import find_port

TOY = Path(__file__).parents[2] / "toy"
KEY = "the trainer's key"
PROMPT = "def add(a, b):\n"
TOKENS = 12


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """The toy teacher with its drafter, routed by prefix; at the end no process is left."""
    folder = tmp_path_factory.mktemp("cluster")
    engine = {"model": str(TOY / "teacher"), "draft": str(TOY / "dflash"), "eager": True, "weight_updates": True}
    engine |= {"kv_cache_gib": 0.25, "max_num_seqs": 4, "max_model_len": 256}
    replicas = {"num_cpus": 0.5, "routing": "prefix", "shutdown_timeout_s": 10.0}
    weights = {"file": str(folder / "weights.json"), "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    tables = {"models": [{"name": "teacher", "engine": engine, "replicas": replicas}], "weights": weights}
    before = list_descendants()
    with local_cluster(tables, find_port("127.0.0.1")) as opened:
        yield opened
    assert count_left(before) == 0


@pytest.fixture(scope="module")
def client(application: Application) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{application.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def tokens(application: Application) -> tuple[int, ...]:
    """The answer of the checkpoint's own weights."""
    answer = Asker(application.url, "teacher", TOKENS).ask(PROMPT)
    assert answer.version == "default"
    assert len(answer.tokens) == TOKENS
    return answer.tokens


def post(application: Application, path: str, body: dict[str, object], key: str | None = None) -> tuple[int, dict]:
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    request = urllib.request.Request(application.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["teacher"]


def test_streams_say_what_whole_answers_say(client: openai.OpenAI) -> None:
    fields = {"model": "teacher", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.0}
    whole = client.completions.create(**fields).choices[0].text
    assert "".join(event.choices[0].text for event in client.completions.create(stream=True, **fields)) == whole
    chat = {"model": "teacher", "messages": [{"role": "user", "content": "def add"}], "max_tokens": TOKENS}
    said = client.chat.completions.create(temperature=0.0, **chat).choices[0].message.content
    parts = client.chat.completions.create(temperature=0.0, stream=True, **chat)
    assert "".join(event.choices[0].delta.content or "" for event in parts) == said


def test_faults_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="teacher", prompt=PROMPT, max_tokens=10_000)


def update(application: Application, body: dict[str, object]) -> tuple[int, dict]:
    """Send new weights; again where nobody was there to take them, as a busy replica may be late to say that it is."""
    for _ in range(20):
        status, report = post(application, "/admin/update_weights", body, KEY)
        if report["outcome"] != "unchanged":
            break
        assert "ask again when there is one" in str(report["errors"]), report
        time.sleep(1)
    return status, report


def test_paths_that_steer_the_engine_are_closed(application: Application) -> None:
    for path in ("/pause", "/update_weights", "/v1/load_lora_adapter", "/collective_rpc"):
        assert post(application, path, {"model": "teacher"})[0] == 404


def test_an_update_needs_its_key_and_stays_with_a_new_replica(
    application: Application, tokens: tuple[int, ...]
) -> None:
    path, body = "/admin/update_weights", {"update": [{"folder": str(TOY / "teacher")}], "weight_version": "v1"}
    body["digests"] = True
    assert [post(application, path, body, key)[0] for key in (None, "another")] == [401, 401]
    status, report = update(application, body)
    assert (status, report["outcome"], report["replicas"]) == (200, "updated", 1), report
    status, report = update(application, {"update": [{"folder": "/nowhere"}]})
    assert (status, report["outcome"], report["weight_version"]) == (502, "rolled_back", "v1"), report
    bench = Bench(application, Asker(application.url, "teacher", TOKENS), [PROMPT], 2)
    (lost,) = bench.wait_for_replicas(1)
    kill_replica(lost)
    (found,) = bench.wait_for_replicas(1, lost.pid)
    assert lost.told is not None
    assert len(lost.told.ranks) == 1
    assert found.told == lost.told
    answer = bench.asker.ask(PROMPT)
    assert (answer.tokens, answer.version, answer.replica) == (tokens, "v1", found.replica)
