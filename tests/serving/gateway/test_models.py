"""Which model a request is for: its name in any kind of body, names that only engines know, and the lists of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from gateway_fakes import NOBODY, Exchange, Gateway, Reply, Upstream, gateway, wait_until

from laguna_serve.serving.gateway.access.asked import UnreadableError, read_asked
from laguna_serve.serving.gateway.config import ConfigError, parse_config
from laguna_serve.serving.gateway.engines import catalog
from laguna_serve.serving.gateway.wire.errors import GatewayError

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"


def form(*parts: tuple[str, bytes], boundary: str = "X") -> bytes:
    body = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode("latin-1") + data + b"\r\n" for head, data in parts)
    return body + f"--{boundary}--\r\n".encode()


FILE = (
    'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav',
    b"RIFF\xff\r\n--\r\n",
)
NAMED = 'Content-Disposition: form-data; name="model"'
JSON_BODIES = {
    "plain": b'{"model": "b"}',
    "escaped": b'{"m\\u006fdel": "\\u0062"}',
    "bom": b'\xef\xbb\xbf{"model": "b"}',
    "nan": b'{"x": NaN, "y": [Infinity, -Infinity], "model": "b"}',
    "lone-surrogate": b'{"prompt": "\\ud83d", "model": "b"}',
    "last-of-two": b'{"model": "a", "model": "b"}',
    "last-of-two-types": b'{"model": 5, "model": "b"}',
    "control-character-escaped": b'{"prompt": "\\u0000", "model": "b"}',
    "utf-16": '{"model": "b"}'.encode("utf-16"),
    "utf-16-be": '{"model": "b"}'.encode("utf-16-be"),
    "utf-32-le": '{"model": "b"}'.encode("utf-32-le"),
    "big-number": b'{"x": 1' + b"0" * 400 + b', "model": "b"}',
}
FORMS = {
    "quoted": ("X", (("model", "b"),), form((NAMED, b"b"), FILE)),
    "behind-the-file": ("X", (), form(FILE, (NAMED, b"b"))),
    "not-quoted": ("X", (), form(("content-disposition: form-data; name=model", b"b"))),
    "in-capitals": ("X", (), form(('CONTENT-DISPOSITION: Form-Data; NAME="model"', b"b"))),
    "more-headers": (
        "X",
        (),
        form(('Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="model"', b"b")),
    ),
    "last-of-two": ("X", (), form((NAMED, b"a"), (NAMED, b"b"))),
    "boundary-of-a-browser": (
        "----WebKitFormBoundary7MA4YWxkTrZu0gW",
        (),
        form((NAMED, b"b"), FILE, boundary="----WebKitFormBoundary7MA4YWxkTrZu0gW"),
    ),
    "boundary-quoted": ('"a b"', (), form((NAMED, b"b"), boundary="a b")),
    "file-called-model": (
        "X",
        (),
        form(('Content-Disposition: form-data; name="model"; filename="x"', b"a"), (NAMED, b"b")),
    ),
}


@pytest.mark.parametrize("name", JSON_BODIES)
def test_name_in_json_as_python_reads_it(name: str) -> None:
    body = JSON_BODIES[name]
    assert json.loads(body)["model"] == "b"
    assert read_asked(body, b"application/json").model == "b"


@pytest.mark.parametrize("name", FORMS)
def test_name_in_a_form(name: str) -> None:
    boundary, _, body = FORMS[name]
    assert read_asked(body, b"multipart/form-data; boundary=" + boundary.encode()).model == "b"
    assert read_asked(body, b"Multipart/Form-Data; charset=utf-8; boundary=" + boundary.encode()).model == "b"


def test_name_in_a_form_of_words() -> None:
    kind = b"application/x-www-form-urlencoded"
    assert read_asked(b"prompt=x&model=b%2Fc+d", kind).model == "b/c d"
    assert read_asked(b'{"model": "b"}', kind).model == "b", "as curl -d sends JSON"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"model": null}', b'{"model": ""}', b"[1]", b'"b"', b"null", form(FILE)]
)
def test_no_name(body: bytes) -> None:
    kind = b"multipart/form-data; boundary=X" if body.startswith(b"--") else b"application/json"
    assert read_asked(body, kind).model is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": 5}', "expected a string, but got an integer instead"),
        (b'{"model": ["b"]}', "expected a string, but got an array instead"),
        (b'{"model": true}', "expected a string, but got a boolean instead"),
        (b"{", "could not parse the JSON body"),
        (b'{"model": "b"} x', "could not parse the JSON body"),
        (b"\xff{", "could not parse the JSON body"),
    ],
)
def test_name_that_cannot_be_read(body: bytes, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        read_asked(body, b"application/json")


@pytest.mark.parametrize("body", [b"no form", b"--Y\r\n", b"--X\r\nnonsense\r\n\r\n"])
def test_form_that_is_none(body: bytes) -> None:
    with pytest.raises(UnreadableError, match="multipart"):
        read_asked(body, b"multipart/form-data; boundary=X")
    with pytest.raises(UnreadableError, match="multipart"):
        read_asked(body, b"multipart/form-data")


@pytest.mark.parametrize("start", [b"[", b'{"a":', b'{"model": "b", "a": [', b'{"x": NaN, "a": ['], ids=repr)
def test_json_that_is_nested_too_deeply(start: bytes) -> None:
    for body in (start * 100_000, start + b"[" * 100_000 + b"]" * 100_000):
        with pytest.raises((GatewayError, UnreadableError)) as caught:
            read_asked(body, b"application/json")
        assert getattr(caught.value, "status", 400) == 400


class Listing(Upstream):
    """An engine that lists these names, and says who it is otherwise."""

    def __init__(self, name: str, *listed: str) -> None:
        super().__init__()
        self.name, self.listed = name, list(listed)
        self.asked = 0
        self.handlers = {MODELS: self.list_models, COMPLETIONS: self.answer, "/v1/audio/transcriptions": self.answer}
        self.answer_to_list: bytes | None = None

    async def list_models(self, exchange: Exchange) -> None:
        self.asked += 1
        cards = [{"id": name, "object": "model", "max_model_len": 99} for name in self.listed]
        await exchange.answer(self.answer_to_list or json.dumps({"object": "list", "data": cards}).encode())

    async def answer(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"engine": self.name}).encode())


@contextlib.contextmanager
def two(one: Upstream, other: Upstream, **model: Any) -> Iterator[Gateway]:
    """The models m, which the first engine serves, and n."""
    with gateway(one, model=model, others=["n"]) as front:
        tables = front.relay.config.model_dump()
        for table in (*tables["models"][0]["upstreams"], *tables["models"][1]["upstreams"]):
            table["url"] = table["url"].replace(NOBODY, other.url)
        config = parse_config(tables, "test")
        front.loop.call_soon_threadsafe(front.relay.configure, config)
        wait_until(lambda: front.relay.config is config)
        yield front


def post(front: Gateway, body: bytes, path: str = COMPLETIONS, headers: str = "") -> Reply:
    return front.ask(path, body, headers)


def test_bodies_of_any_kind_reach_their_model() -> None:
    with Listing("A") as a, Listing("B") as b, two(a, b) as front:
        for body in JSON_BODIES.values():
            reply = post(front, json.dumps({"model": "n"}).encode() if body == JSON_BODIES["plain"] else body)
            assert reply.status in (200, 404), "b is nobody's name"
        assert post(front, '{"x": NaN, "model": "n"}'.encode("utf-16")).json() == {"engine": "B"}
        headers = "content-type: multipart/form-data; boundary=X\r\n"
        body = form(FILE, (NAMED, b"n"))
        assert post(front, body, "/v1/audio/transcriptions", headers).json() == {"engine": "B"}
        assert post(front, b"{}").json() == {"engine": "A"}, "the first, where none is named"
        assert post(front, b'{"model": ""}').json() == {"engine": "A"}
        for wrong in (b'{"model": 5}', b"{", b"[" * 100_000):
            reply = post(front, wrong)
            assert reply.status == 400
            assert reply.json()["error"]["type"] == "invalid_request_error"


def test_one_model_leaves_names_and_bodies_to_its_engine() -> None:
    with Listing("A", "m") as a, gateway(a) as front:
        for body in (b'{"model": "m"}', b'{"model": 5}', b'{"model": ""}', b"{", b"\xff"):
            assert post(front, body).json() == {"engine": "A"}
        assert a.asked == 0
        assert post(front, b'{"model": "any"}').json() == {"engine": "A"}, "it knows its names"
        assert post(front, b'{"a":' * 100_000).status == 400
        assert post(front, b"[" * 100_000).status == 400


@pytest.mark.parametrize("answer", [b"{}", b'{"data": []}', b"no JSON"])
def test_engine_that_knows_no_names_is_asked_for_the_models_own(answer: bytes) -> None:
    with Listing("A") as a, gateway(a) as front:
        a.answer_to_list = answer
        refused = post(front, b'{"model": "any"}')
        assert (refused.status, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert post(front, b'{"model": "m"}').json() == {"engine": "A"}


def test_aliases_lead_to_their_model() -> None:
    with Listing("A", "m", "gpt") as a, Listing("B") as b, two(a, b, aliases=["gpt", "org/name"]) as front:
        for name in ("m", "gpt", "org/name"):
            assert post(front, json.dumps({"model": name}).encode()).json() == {"engine": "A"}
        assert a.asked == 0
        cards = {card["id"]: card for card in front.ask(MODELS).json()["data"]}
        assert list(cards) == ["m", "gpt", "org/name", "n"]
        assert cards["gpt"]["max_model_len"] == 99, "as the engine lists it"
        assert cards["org/name"]["owned_by"] == "laguna"


def test_alias_that_is_taken_is_refused() -> None:
    upstreams = [{"name": "a", "url": NOBODY}]
    others = [{"name": "b", "url": NOBODY}]
    for aliases in (["n"], ["m"], ["x", "x"]):
        models = [{"name": "m", "aliases": aliases, "upstreams": upstreams}, {"name": "n", "upstreams": others}]
        with pytest.raises(ConfigError, match="distinct names of models"):
            parse_config({"models": models}, "test")


def test_names_that_engines_list_are_found_and_those_that_none_lists_are_404() -> None:
    with Listing("A", "m", "sql-lora") as a, Listing("B", "n", "fr-lora") as b, two(a, b) as front:
        assert post(front, b'{"model": "fr-lora"}').json() == {"engine": "B"}
        assert post(front, b'{"model": "sql-lora"}').json() == {"engine": "A"}
        asked = a.asked
        for _ in range(20):
            reply = post(front, b'{"model": "nobody"}')
            assert reply.status == 404
            assert reply.json()["error"] == {
                "message": "The model `nobody` does not exist.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        assert a.asked - asked <= 10, "not asked for every one"
        assert [card["id"] for card in front.ask(MODELS).json()["data"]] == ["m", "sql-lora", "n", "fr-lora"]


def test_name_that_an_engine_listed_holds_while_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "ASK_EVERY_S", 0.0)

    async def list_adapter(exchange: Exchange) -> None:
        await exchange.answer(b'{"data": [{"id": "adapter"}]}')

    async def be_silent(exchange: Exchange) -> None:
        exchange.abort()

    with Upstream({MODELS: list_adapter}) as one, Upstream() as two:
        models = [
            {"name": name, "upstreams": [{"name": name, "url": each.url}]} for name, each in (("a", one), ("b", two))
        ]
        with gateway(models=models) as front:

            def ask(name: str) -> int:
                front.relay.catalog._asked_s -= catalog.GOOD_FOR_S  # as if it were long ago
                return front.ask(COMPLETIONS, json.dumps({"model": name}).encode()).status

            assert (ask("adapter"), ask("other")) == (200, 404)
            one.handlers[MODELS] = be_silent
            assert (ask("adapter"), ask("other")) == (200, 503)
            assert front.ask(f"{MODELS}/adapter").status == 200
            one.handlers[MODELS] = list_adapter
            assert (ask("adapter"), ask("other")) == (200, 404)


def test_name_that_is_looked_up_while_a_reload_comes_is_found() -> None:
    with Upstream() as one, Upstream() as two:
        models = [
            {"name": name, "upstreams": [{"name": name, "url": each.url}]} for name, each in (("a", one), ("b", two))
        ]
        with gateway(models=models) as front:
            more = [{"name": "c", "upstreams": [{"name": "c", "url": two.url}]}]
            config = parse_config({"models": models + more, "server": {"port": front.port}}, "test")

            async def configure() -> None:
                front.relay.configure(config)

            async def reload_first(exchange: Exchange) -> None:
                one.handlers[MODELS] = list_adapter
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(configure(), front.loop))
                await list_adapter(exchange)

            async def list_adapter(exchange: Exchange) -> None:
                await exchange.answer(b'{"data": [{"id": "adapter"}]}')

            one.handlers[MODELS] = reload_first
            assert front.ask(COMPLETIONS, b'{"model": "adapter"}').status == 200


def test_lists_that_are_none_are_passed_over() -> None:
    with Listing("A") as a, Listing("B", "fr-lora") as b, two(a, b) as front:
        for wrong in (b"{}", b"[", b'{"data": 5}', b'{"data": [5]}', b'{"data": [{"id": 5}]}', b" " * (2 << 20)):
            a.answer_to_list = wrong
            front.relay.catalog.configure(front.relay.pools)
            assert post(front, b'{"model": "fr-lora"}').json() == {"engine": "B"}
            assert [card["id"] for card in front.ask(MODELS).json()["data"]] == ["m", "n", "fr-lora"]


@pytest.mark.parametrize("name", ["m", "sql-lora", "org/name", "org%2Fname"])
def test_model_by_its_name(name: str) -> None:
    with Listing("A", "m", "sql-lora") as a, Listing("B") as b:
        for front_of in (lambda: gateway(a, model={"aliases": ["org/name"]}), lambda: two(a, b, aliases=["org/name"])):
            with front_of() as front:
                reply = front.ask(f"{MODELS}/{name}")
                assert (reply.status, reply.json()["id"]) == (200, name.replace("%2F", "/"))
                for other in ("/v1/models/", "/v1/modelsx", "/v1/models?x"):
                    assert front.ask(other).json().get("id") is None
                missing = front.ask(f"{MODELS}/nobody%2Fthere")
                assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_openais_client_finds_models() -> None:
    with (
        Listing("A", "m", "org/lora") as a,
        gateway(a) as front,
        openai.OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert client.models.retrieve("org/lora").id == "org/lora"
        assert [model.id for model in client.models.list()] == ["m", "org/lora"]
        with pytest.raises(openai.NotFoundError, match="The model `x` does not exist"):
            client.models.retrieve("x")


def test_client_that_leaves_while_engines_are_asked_leaves_nothing() -> None:
    class Slow(Listing):
        async def list_models(self, exchange: Exchange) -> None:
            self.asked += 1
            await exchange.reader.read(1)

    with Slow("A") as a, Listing("B") as b, two(a, b) as front:
        with front.connect() as connection:
            body = b'{"model": "nobody"}'
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 19\r\n\r\n" + body)
            wait_until(lambda: a.asked > 0)
        front.wait_idle()
