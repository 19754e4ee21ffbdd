"""The logit store: what is written is what is read, whoever wrote it; what is another one's is refused."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_laguna import make_tiny, read_config, save_tiny

from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.losses import find_top
from laguna_serve.scripts.training.dense.plan.memory import place_bytes
from laguna_serve.scripts.training.dense.stages import Taught, sum_kl
from laguna_serve.scripts.training.dense.store.endpoint import EndpointTeacher
from laguna_serve.scripts.training.dense.store.format import LogitStore, StoreError, StoreHeader, open_header
from laguna_serve.scripts.training.dense.store.writer import is_made, write_by, write_by_layers, write_by_model
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES, Beside, Drawn
from laguna_serve.scripts.training.dense.text import Chats
from laguna_serve.scripts.training.dense.tokens import write_tokens
from laguna_serve.scripts.training.pruning.streaming.layers import Layers
from laguna_serve.scripts.training.pruning.streaming.weights import Weights
from laguna_serve.scripts.training.ranks import ALONE
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.engine import Engine

V = 64
RECIPE = Recipe(seed=0, stage1_steps=1, stage2_steps=20, rows=2, length=12)
HEADER = StoreHeader(
    top_k=4,
    vocab_size=V,
    batches=20,
    rows=2,
    length=12,
    seed=0,
    on="chats",
    teacher="t",
    tokenizer="k",
    text="x",
    held_out="h",
    source="forward",
)


def make_chats(seed: int) -> Chats:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, V, (9,), generator=generator).tolist() for _ in range(6)]
    return Chats(write_tokens(((row, [False] * 4 + [True] * 5) for row in rows), None, {}))


@pytest.fixture(scope="module")
def teacher() -> Any:
    return make_tiny().requires_grad_(False)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn(make_chats(0), make_chats(1), RECIPE)


@pytest.fixture
def store(teacher: Any, drawn: Drawn, tmp_path: Path) -> Path:
    open_header(tmp_path / "store", HEADER)
    write_by_model(tmp_path / "store", HEADER, drawn, teacher)
    return tmp_path / "store"


@pytest.mark.slow
def test_store_has_the_batches_of_the_recipe_and_the_teachers_top(store: Path, teacher: Any, drawn: Drawn) -> None:
    read = LogitStore(store)
    for got, wanted in [
        (read.batch(3), drawn.batch(3)),
        (read.batch(23), drawn.batch(3)),
        (read.held_out(1), drawn.held_out(1)),
    ]:
        assert torch.equal(got.ids, wanted.ids)
        assert torch.equal(got.spoken, wanted.spoken)
        top = read.top(got, slice(1, 2))
        logits = teacher(input_ids=wanted.ids[1:]).logits[0, :-1][wanted.predicted[1]]
        expected = find_top(logits, 4)
        assert top.ids is not None
        assert torch.equal(top.ids, expected.ids)
        torch.testing.assert_close(top.logprobs, expected.logprobs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(top.tail, expected.tail)
        assert (top.logprobs.exp().sum(-1) + top.tail.exp()).allclose(torch.ones(len(top.tail)), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, V])
def test_loss_from_a_store_is_that_beside_the_teacher(k: int, teacher: Any, drawn: Drawn, tmp_path: Path) -> None:
    header = msgspec.structs.replace(HEADER, top_k=k)
    open_header(tmp_path, header)
    write_by_model(tmp_path, header, drawn, teacher)
    read = LogitStore(tmp_path)
    student = make_tiny(num_experts_per_tok=1)
    beside = Beside(teacher, drawn)
    everything = slice(0, 2)
    full = sum_kl(Taught(student), beside, beside.batch(0), everything).item()
    stored = sum_kl(Taught(student), read, read.batch(0), everything).item()
    assert stored == pytest.approx(full, rel=2e-3) if k == V else stored < full
    places, tail = read.describe_tail()
    assert (tail == 0) == (k == V)
    size = read.num_bytes / places
    rest = 5 * RECIPE.rows * RECIPE.length * (20 + HELD_OUT_BATCHES) / places  # ids and who says them
    assert place_bytes(k, V) < size < place_bytes(k, V) + rest + 40


@pytest.mark.slow
def test_layers_one_at_a_time_write_the_same(store: Path, teacher: Any, drawn: Drawn, tmp_path: Path) -> None:
    folder = save_tiny(teacher, tmp_path / "model")
    layers = Layers(folder, Weights(folder, read_config(folder)), torch.float32, torch.device("cpu"))
    open_header(tmp_path / "other", HEADER)
    write_by_layers(tmp_path / "other", HEADER, drawn, layers, tmp_path / "work", ALONE)
    one, other = LogitStore(store), LogitStore(tmp_path / "other")
    for step in (0, 7, 19):
        a, b = (s.top(s.batch(step), slice(0, 2)) for s in (one, other))
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=2e-3, atol=1e-5)
    assert not list((tmp_path / "work").rglob("*.bin"))


@pytest.mark.slow
def test_what_was_stopped_goes_on_to_the_same_bytes(store: Path, teacher: Any, drawn: Drawn, tmp_path: Path) -> None:
    asked = []

    def answer(number: int, batch: Any) -> Any:
        asked.append(number)
        if len(asked) == 20:
            raise KeyboardInterrupt
        return [
            find_top(teacher(input_ids=row[None]).logits[0, :-1][p], 4)
            for row, p in zip(batch.ids, batch.predicted, strict=True)
        ]

    cut = tmp_path / "cut"
    open_header(cut, HEADER)
    with pytest.raises(KeyboardInterrupt):
        write_by(cut, HEADER, drawn, answer)
    with pytest.raises(StoreError, match=r"expected 2 shards, got none of shard-00001\.safetensors; write it first"):
        LogitStore(cut)
    first = (cut / "shard-00000.safetensors").stat().st_mtime_ns
    open_header(cut, HEADER)
    write_by_model(cut, HEADER, drawn, teacher)
    assert (cut / "shard-00000.safetensors").stat().st_mtime_ns == first, "it was whole"
    assert (cut / "shard-00001.safetensors").read_bytes() == (store / "shard-00001.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["teacher", "tokenizer", "text", "held_out", "source", "on"])
def test_store_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    open_header(tmp_path, HEADER)
    wanted = msgspec.structs.replace(HEADER, **{name: "other"})
    with pytest.raises(StoreError, match=f"expected the logits of {name} other, got those of "):
        open_header(tmp_path, wanted)


def test_store_of_another_k_or_of_none_is_refused(tmp_path: Path) -> None:
    open_header(tmp_path, HEADER)
    with pytest.raises(StoreError, match=r"expected the logits of top_k 8, got those of 4; name another folder"):
        open_header(tmp_path, msgspec.structs.replace(HEADER, top_k=8))
    (tmp_path / "header.json").write_text("{}")
    with pytest.raises(StoreError, match="expected a logit store, got none"):
        open_header(tmp_path, HEADER)


class Server(ThreadingHTTPServer):
    """Answers prompt log-probabilities as vLLM does: the K likeliest of every token, and the prompt's own."""

    teacher: Any = None
    given: int = V

    def answer(self, body: Any) -> Any:
        ids, k = body["prompt"], min(body["prompt_logprobs"], self.given)
        logprobs = self.teacher(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        steps: list[Any] = [None]
        for row, own in zip(logprobs, ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            kept = {*order[:k], own}
            steps.append({str(i): {"logprob": row[i].item(), "rank": order.index(i) + 1} for i in kept})
        return {"choices": [{"prompt_logprobs": steps}]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt_logprobs"] > 20:
            self.reply(400, {"error": {"message": "more than max_logprobs"}})
        else:
            self.reply(200, self.server.answer(body))

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


@pytest.fixture
def server(teacher: Any) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.teacher = teacher
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_server_gives_what_the_teacher_gives(server: Server, store: Path, drawn: Drawn, tmp_path: Path) -> None:
    open_header(tmp_path / "asked", HEADER)
    with EndpointTeacher(f"http://127.0.0.1:{server.server_port}", None, 4) as asked:
        assert asked.name == "tiny"
        write_by(tmp_path / "asked", HEADER, drawn, asked.answer)
    one, other = LogitStore(store), LogitStore(tmp_path / "asked")
    a, b = (s.top(s.batch(5), slice(0, 2)) for s in (one, other))
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(a.tail, b.tail, rtol=1e-3, atol=1e-4)


def test_server_that_gives_less_is_named(server: Server, drawn: Drawn) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    with EndpointTeacher(url, None, 32) as asked, pytest.raises(EndpointError, match="start it with --max-logprobs 32"):
        asked.answer(0, drawn.batch(0))
    server.given = 3
    with (
        EndpointTeacher(url, None, 4) as asked,
        pytest.raises(StoreError, match=r"expected 4 log-probabilities .* got 3"),
    ):
        asked.answer(0, drawn.batch(0))


def test_nobody_at_the_endpoint_leaves_no_connection_open(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(EndpointError, match="is the engine up"):
        EndpointTeacher("http://127.0.0.1:1", None, 4)
    gc.collect()
    assert not [str(warning.message) for warning in recwarn if warning.category is ResourceWarning]


def test_a_whole_store_is_taken_whoever_gave_it(store: Path, tmp_path: Path) -> None:
    assert is_made(store, HEADER)
    assert is_made(store, msgspec.structs.replace(HEADER, source="endpoint tiny"))
    assert not is_made(store, msgspec.structs.replace(HEADER, seed=HEADER.seed + 1))
    assert not is_made(tmp_path, HEADER)
    open_header(tmp_path, HEADER)
    assert not is_made(tmp_path, HEADER)


@pytest.mark.vllm
def test_vllm_gives_what_transformers_gives(fp32_engine: Engine) -> None:
    from transformers import LagunaForCausalLM

    model: Any = LagunaForCausalLM.from_pretrained(fp32_engine.config.model, dtype=torch.float32).eval()
    batch = Drawn(make_chats(0), make_chats(1), RECIPE).batch(0)
    with EndpointTeacher(fp32_engine.base_url, None, 8) as asked:
        answers = asked.answer(0, batch)
    with torch.no_grad():
        logits = model(input_ids=batch.ids).logits[:, :-1]
    for row, answer in enumerate(answers):
        expected = find_top(logits[row][batch.predicted[row]], 8)
        torch.testing.assert_close(answer.logprobs, expected.logprobs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(answer.tail, expected.tail, rtol=1e-3, atol=1e-3)
