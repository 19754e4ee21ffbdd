"""Put the cases of plugins/repairs' front end to vLLM and print the outcome, as JSON: limits_probe.py stock|repaired.

In a process of its own, as repairs are for good.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import vllm.entrypoints.launchers.app as launcher
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import SamplingParams
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.serial_utils import MsgpackEncoder
from vllm.v1.structured_output import backend_guidance, backend_outlines

MANY = 150_000
SCHEMAS: dict[str, Any] = {
    "minItems": {"type": "array", "minItems": MANY},
    "nested": {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "maxLength": MANY}]}}},
    "pattern": {"type": "string", "pattern": f"a{{{MANY}}}"},
    "huge pattern": {"type": "string", "pattern": "a{" + "9" * 5000 + "}"},
    "small": {"type": "array", "minItems": 3, "maxItems": 90_000},
}
forgotten: list[list[str]] = []


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "taken"


def wish(**kind: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**kind))


def guidance() -> dict[str, str]:
    """The check alone: llguidance's own is not what is asked about."""
    backend_guidance.llguidance = SimpleNamespace(LLMatcher=SimpleNamespace(validate_grammar=lambda *_: ""))
    backend_guidance.serialize_guidance_grammar = lambda *_: ""
    answers = {
        name: outcome(lambda schema=schema: backend_guidance.validate_guidance_grammar(wish(json=schema)))
        for name, schema in SCHEMAS.items()
    }
    answers["text"] = outcome(
        lambda: backend_guidance.validate_guidance_grammar(wish(json=json.dumps(SCHEMAS["minItems"])))
    )
    answers["regex"] = outcome(lambda: backend_guidance.validate_guidance_grammar(wish(regex=f"(?=a)a{{1,{MANY}}}")))
    return answers


def outlines() -> str:
    backend_outlines.validate_regex_is_buildable = lambda *_: None
    check = backend_outlines.validate_structured_output_request_outlines
    return outcome(lambda: check(wish(regex="(?=a)a{5000}")))


def properties() -> list[str]:
    backend, model = SimpleNamespace(backend="outlines"), SimpleNamespace(is_diffusion=False)
    backend_outlines.validate_regex_is_buildable = lambda *_: None
    answers = []
    for count in (1000, 1001):
        schema = {"type": "object", "properties": {f"p{place}": {"type": "integer"} for place in range(count)}}
        params = wish(json=schema)
        answers.append(outcome(lambda params=params: params._validate_structured_outputs(model, backend, object())))
    return answers


def sequences() -> str:
    return outcome(lambda: SamplingParams(n=129))


def surrogate() -> list[Any]:
    """What sending a request to the engine's process comes to, and which request the front end forgets."""

    class Core:
        async def add_request_async(self, request: Any) -> None:
            MsgpackEncoder().encode(request.sampling_params)

    front = SimpleNamespace(
        output_processor=SimpleNamespace(
            has_request=lambda _: True,
            add_request=lambda *_: None,
            abort_requests=lambda ids, internal: forgotten.append(ids),
        ),
        engine_core=Core(),
        log_requests=False,
    )
    request = SimpleNamespace(request_id="r", sampling_params=SamplingParams(stop=["\ud800"]))
    answer = outcome(lambda: asyncio.run(AsyncLLM._add_request(front, request, None, None, 0, None)))
    return [answer.split(":")[0], forgotten]


def messages() -> list[Any]:
    """Answers to a body that is none, on a route of Anthropic's and on one of OpenAI's, and to an error of its own."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)

    @app.post("/v1/messages")
    @app.post("/v1/completions")
    def route(body: dict[str, int]) -> None:
        raise VLLMValidationError("no", parameter="x")

    # As the server does: the routes are imported after the plugins are loaded.
    from vllm.entrypoints.anthropic import api_router

    @app.post("/v1/messages/own")
    def own() -> Any:
        return api_router.translate_error_response(error_response.create_error_response(VLLMValidationError("no")))

    launcher.init_exception_handler(app)
    client = TestClient(app)
    answers = [client.post(path, json=body) for path in ("/v1/messages", "/v1/completions") for body in (5, {"a": 1})]
    answers.append(client.post("/v1/messages/own"))
    return [[answer.status_code, answer.json().get("type"), answer.json()["error"]["type"]] for answer in answers]


def routes() -> list[Any]:
    """Answers to a path that is not there and to a method that is not taken, of OpenAI's and of Anthropic's API."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    for path in ("/v1/completions", "/v1/messages"):
        app.post(path)(lambda: None)
    launcher.init_exception_handler(app)
    client = TestClient(app)
    answers = [client.get(path) for path in ("/v1/nope", "/v1/completions", "/v1/messages")]
    return [[answer.status_code, answer.json().get("error", {}).get("message")] for answer in answers]


def leaving() -> list[Any]:
    """What an engine that lets its requests end says of its health and to a request, before its text is read or not."""
    engine = AsyncLLM.__new__(AsyncLLM)
    engine.scheduler_config = SimpleNamespace(max_num_queued_reqs=None, max_num_queued_tokens=None)
    engine.engine_core = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False), shutdown=lambda timeout: None, is_sleeping=False
    )
    engine.output_handler = None
    engine.shutdown(timeout=1)
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    try:
        pool.submit(print)
    except RuntimeError as error:
        status = error_response.create_error_response(error).error.code
    health = outcome(lambda: asyncio.run(engine.check_health())).split(":")[0]
    return [health, outcome(engine.check_admission).split(":")[0], status]


def unreadable() -> list[Any]:
    """The status for an attribute that is not there, met in reading a request, and in the server's own code."""
    answers = []
    for read in (True, False):
        try:
            params: Any = backend_guidance.has_guidance_unsupported_json_features(NoWalk()) if read else wish(json={})
            answers.append(params.nothing)
        except Exception as error:
            answers.append(error_response.create_error_response(error).error.code)
    return answers


class NoWalk(dict[str, Any]):
    """A schema that cannot be walked."""

    def values(self) -> Any:
        raise AttributeError("'list' object has no attribute 'get'")


def dead_end() -> str:
    """What a request comes to that the engine has ended with an error."""
    config = SimpleNamespace(kv_transfer_config=None, ec_transfer_config=None)
    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
    return outcome(lambda: GenerateBaseServing._raise_if_error(serving, "error", "r")).split(":")[0]


if __name__ == "__main__":
    if sys.argv[1] == "repaired":
        from laguna_serve.plugins.repairs import repair_front_end

        repair_front_end()
        repair_front_end()
    cases = (unreadable, dead_end, routes, leaving, messages, surrogate, sequences, properties, guidance, outlines)
    print(json.dumps({case.__name__: case() for case in cases}))
