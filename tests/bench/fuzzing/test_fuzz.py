"""The generator of requests: what it makes up, what it calls wrong, and how it cuts a finding down."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from laguna_serve.bench import fuzz
from laguna_serve.bench.fuzzing import runner
from laguna_serve.bench.fuzzing.client import Answer, check_batch, judge, open_session
from laguna_serve.bench.fuzzing.minimise import minimise
from laguna_serve.bench.fuzzing.options import FuzzConfig
from laguna_serve.bench.fuzzing.requests import Request, draw_batches, list_parameters, list_singles
from laguna_serve.bench.fuzzing.result import Finding, FuzzedEngine, FuzzResult
from laguna_serve.bench.fuzzing.runner import Fuzz, group, normalise
from laguna_serve.bench.fuzzing.values import JUNK, VALUES
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result

OPENAPI = {
    "paths": {
        "/v1/completions": {
            "post": {
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Completion"}}}
                }
            }
        },
        "/tokenize": {
            "post": {
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": {
                                "anyOf": [{"$ref": "#/components/schemas/A"}, {"$ref": "#/components/schemas/B"}]
                            }
                        }
                    }
                }
            }
        },
        "/scale_elastic_ep": {"post": {}},
        "/health": {"get": {}},
    },
    "components": {
        "schemas": {
            "Completion": {
                "properties": {"top_k": {"type": "integer"}, "brand_new": {"anyOf": [{"enum": ["a", "b"]}]}}
            },
            "A": {"properties": {"prompt": {}}},
            "B": {"properties": {"messages": {}}},
        }
    },
}
ERROR = json.dumps({"error": {"message": "no", "type": "BadRequestError", "code": 400}}).encode()
ANTHROPIC = json.dumps({"type": "error", "error": {"message": "no", "type": "invalid_request_error"}}).encode()


def test_every_parameter_of_every_route_comes_alone_with_every_value() -> None:
    parameters = list_parameters(OPENAPI)
    assert {route: sorted(names) for route, names in parameters.items()} == {
        "/v1/completions": ["brand_new", "top_k"],
        "/tokenize": ["messages", "prompt"],
        "/invocations": ["brand_new", "top_k"],
    }
    singles = [request for request in list_singles(parameters, "m") if request.route == "/v1/completions"]
    values = [
        request.body["top_k"] for request in singles if isinstance(request.body, dict) and "top_k" in request.body
    ]
    assert len(values) == len(VALUES["top_k"]) + len(JUNK)
    assert "b" in [r.body["brand_new"] for r in singles if isinstance(r.body, dict) and "brand_new" in r.body]


def test_equal_seeds_draw_equal_batches() -> None:
    parameters = list_parameters(OPENAPI)
    one, same, other = (repr(draw_batches(parameters, "m", seed_value=value, count=20)) for value in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("status", "kind", "body", "route", "wrong"),
    [
        (200, "application/json", b"{}", "/v1/completions", None),
        (400, "application/json", ERROR, "/v1/completions", None),
        (400, "application/json", ANTHROPIC, "/v1/messages", None),
        (501, "application/json", ERROR, "/v1/systemone", None),
        (400, "application/json", ERROR, "/v1/messages", "not Anthropic's"),
        (400, "application/json", b'{"detail": "no"}', "/v1/completions", "without message"),
        (400, "text/plain", b"no", "/v1/completions", "not JSON"),
        (500, "application/json", ERROR, "/v1/completions", "status 500"),
        (302, "text/plain", b"", "/v1/completions", "status 302"),
        (200, "text/event-stream", b'data: {"choices": []}\n\ndata: [DONE]\n\n', "/v1/completions", None),
        (200, "text/event-stream", b'data: {"error": {"code": 500}}\n\n', "/v1/completions", "within a stream"),
        (200, "text/event-stream", b'data: {"error": {"code": 400}}\n\n', "/v1/completions", None),
        (200, "text/event-stream", b"data: {\n\n", "/v1/completions", "not JSON"),
    ],
)
def test_what_is_wrong_with_an_answer(status: int, kind: str, body: bytes, route: str, wrong: str | None) -> None:
    verdict = judge(status, kind, body, route)
    assert verdict is None if wrong is None else wrong in (verdict or "")


def test_an_engine_that_is_not_there_is_dead() -> None:
    async def run() -> list[str]:
        async with open_session() as session:
            _, wrong = await check_batch(session, "http://127.0.0.1:9", "m", [Request("/v1/completions", {})], [1])
            return wrong

    assert asyncio.run(run())[0].startswith("death")


def test_a_finding_is_cut_down_to_what_shows_it() -> None:
    bad = {"model": "m", "prompt": "x", "top_k": 5, "seed": 1, "stop": "x"}
    batch = [
        Request("/v1/completions", {"prompt": "x", "n": 2}),
        Request("/v1/completions", bad),
        Request("/ping", None),
    ]
    tried = []

    async def persists(smaller: list[Request]) -> bool:
        tried.append(smaller)
        return any(isinstance(r.body, dict) and {"top_k", "seed"} <= r.body.keys() for r in smaller)

    kept = {key: value for key, value in bad.items() if key != "stop"}
    assert asyncio.run(minimise(batch, persists, most=14)) == [Request("/v1/completions", kept)]
    tried.clear()
    asyncio.run(minimise(batch, persists, most=3))
    assert len(tried) == 3


def test_findings_that_differ_in_numbers_are_one() -> None:
    assert normalise("status 500: at 0x1234, 17 tokens") == normalise("status 500: at 0x9234, 3 tokens")


def test_kinds_of_one_batch_are_found_apart_but_behind_a_death() -> None:
    wrong = ["control: expected [1], got [2]", "status 500: a", "status 500: b 7", "status 500: b 8"]
    assert [len(lines) for lines in group(wrong, whole=False).values()] == [1, 1, 2]
    assert list(group(["death: x", "status 500"], whole=True).values()) == [["death: x", "status 500"]]


def test_engine_that_answers_otherwise_than_before_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every later batch would be called wrong, whatever it asks, and its own faults not be seen."""
    started: list[bool] = []

    class Stub:
        base_url = model_name = "x"
        poisoned = False

        def stop(self) -> None:
            started[-1] = False

    async def start(run: Any) -> Any:
        if run._engine is None:
            started.append(True)
            run._engine = Stub()
        return run._engine

    async def check(_session: Any, _url: str, _model: str, batch: list[Request], _control: Any) -> Any:
        engine = run._engine
        engine.poisoned = engine.poisoned or any("poison" in request.body for request in batch)
        wrong = ["control: expected [1], got [2]"] if engine.poisoned else []
        wrong += ["status 500: no"] if any("bad" in request.body for request in batch) else []
        return [Answer(200, b"", None)] * len(batch), wrong

    monkeypatch.setattr(Fuzz, "_start", start)
    monkeypatch.setattr(runner, "check_batch", check)
    run = Fuzz(FuzzConfig(model="m", out=tmp_path), Progress(quiet=True))
    batches = [[{"a": 1}, {"poison": 1}], [{"a": 1}, {"bad": 1}], [{"a": 1}]]
    for batch in batches:
        asyncio.run(run._try([Request("/v1/completions", body, 1) for body in batch]))
    findings = {found.kind: found for found in run.report().findings}
    assert [len(found.requests) for found in findings.values()] == [1, 1]
    assert "poison" in str(findings["control: expected [#], got [#]"].requests)
    assert "bad" in str(findings["status #: no"].requests)
    assert [found.seen for found in findings.values()] == [1, 1]


def test_a_run_is_resumed_where_it_stopped_and_otherwise_begun_anew(tmp_path: Path) -> None:
    requests = [Request("/v1/completions", {"prompt": "\ud800"}, 1).quote()]
    assert requests[0].body == "{'prompt': '\\ud800'}"
    finding = Finding(kind="status #", wrong=["status 500"], died=True, seen=2, requests=requests)
    earlier = FuzzResult(
        environment=Environment(date="", command=""),
        engine=FuzzedEngine(model="m", draft=None, seed=1),
        batches=7,
        requests=30,
        starts=2,
        minutes=1.5,
        deaths=1,
        findings=[finding],
        statuses={"/ping 200": 3},
    )
    write_result(tmp_path / "fuzz.json", earlier)
    (tmp_path / "sent.jsonl").write_text("{}\n")
    quiet = Progress(quiet=True)
    resumed = Fuzz(FuzzConfig(model="m", out=tmp_path, resume=True), quiet).report()
    assert structs.replace(resumed, environment=earlier.environment) == earlier
    assert (tmp_path / "sent.jsonl").read_text() == "{}\n"
    anew = Fuzz(FuzzConfig(model="m", out=tmp_path), quiet).report()
    assert (anew.batches, anew.findings, (tmp_path / "sent.jsonl").read_text()) == (0, [], "")
    assert read_result(tmp_path / "fuzz.json", FuzzResult) == anew


def test_model_that_is_not_there_leaves_an_earlier_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sent.jsonl").write_text("earlier")
    assert fuzz.main(["--model", str(tmp_path / "nowhere"), "--minutes", "1", "--out", str(tmp_path)]) == 2
    assert "expected an existing folder or a hub id" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sent.jsonl"]
    assert (tmp_path / "sent.jsonl").read_text() == "earlier"
