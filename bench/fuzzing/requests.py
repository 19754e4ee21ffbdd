"""Requests made up from an engine's own OpenAPI document: every parameter of every route alone, and many at once.

`list_singles` is the same for equal documents; `draw_batches` draws from a hypothesis strategy, by seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from laguna_serve.bench.fuzzing.result import SentRequest
from laguna_serve.bench.fuzzing.values import CHARACTERS, JUNK, MESSAGES, PROMPTS, VALUES
from laguna_serve.serving.kit.results import JsonObject

# Route → parameter → its JSON schema.
Parameters = dict[str, dict[str, JsonObject]]

# What a route needs before it says anything about its other parameters.
BASES: dict[str, JsonObject] = {
    "/v1/completions": {"prompt": CHARACTERS, "max_tokens": 8},
    "/v1/chat/completions": {"messages": MESSAGES[0], "max_tokens": 8},
    "/v1/chat/completions/batch": {"messages": [MESSAGES[0], MESSAGES[0]], "max_tokens": 8},
    "/v1/responses": {"input": CHARACTERS, "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES[0], "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": MESSAGES[0]},
    "/tokenize": {"prompt": CHARACTERS},
    "/detokenize": {"tokens": [5, 6]},
    "/generative_scoring": {"query": "x", "items": ["y"], "label_token_ids": [5, 6]},
    "/v1/systemone": {"state": "x", "questions": {}},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 8}},
    "/invocations": {"prompt": CHARACTERS, "max_tokens": 8},
}
# Not a client's business, and not open to one behind the gateway.
LEFT_OUT = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
# Bodies that are not an object of parameters.
BARE: tuple[Any, ...] = (None, [], "x", 5, {})


@dataclass(frozen=True)
class Request:
    """One request; `leave_after` is the number of bytes of the answer after which the client goes, None for none."""

    route: str
    body: Any
    leave_after: int | None = None

    def quote(self) -> SentRequest:
        """Quote the request as a report has it, its body as Python text."""
        return SentRequest(route=self.route, body=repr(self.body), leave_after=self.leave_after)


def list_parameters(openapi: JsonObject) -> Parameters:
    """List the parameters of every POST route that takes JSON."""
    schemas = openapi["components"]["schemas"]
    routes: Parameters = {}
    for route, methods in openapi["paths"].items():
        if "post" not in methods or route in LEFT_OUT or "{" in route:
            continue
        content = methods["post"].get("requestBody", {}).get("content", {}).get("application/json", {})
        properties: dict[str, JsonObject] = {}
        for schema in _find_objects(content.get("schema", {}), schemas):
            properties |= schema.get("properties", {})
        routes[route] = properties
    routes["/invocations"] = dict(routes.get("/v1/completions", {}))
    return routes


def _find_objects(schema: JsonObject, schemas: JsonObject) -> list[JsonObject]:
    if "$ref" in schema:
        return _find_objects(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    inner = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [schema] if not inner else [object_schema for one in inner for object_schema in _find_objects(one, schemas)]


def find_values(name: str, schema: JsonObject) -> list[Any]:
    """Find what to send as a parameter: by its name, else what its schema lists; junk in any case."""
    listed = [value for one in (schema, *schema.get("anyOf", ())) for value in one.get("enum", ())]
    return [*VALUES.get(name, listed), *JUNK]


def list_singles(parameters: Parameters, model: str) -> list[Request]:
    """Every parameter of every route with each of its values, alone; and bodies that are no parameters."""
    requests = [Request(route, body) for route in parameters for body in BARE]
    for route, properties in parameters.items():
        base = {"model": model, **BASES.get(route, {})}
        for name, schema in properties.items():
            requests += [Request(route, base | {name: value}) for value in find_values(name, schema)]
    return requests


def draw_batches(parameters: Parameters, model: str, *, seed_value: int, count: int) -> list[list[Request]]:
    """Batches of one to five requests that are sent together, the same for the same seed."""
    drawn: list[list[Request]] = []

    @seed(seed_value)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(_requests(parameters, model), min_size=1, max_size=5))
    def collect(batch: list[Request]) -> None:
        drawn.append(batch)

    collect()
    return drawn


@st.composite
def _requests(draw: st.DrawFn, parameters: Parameters, model: str) -> Request:
    weighted = [route for route in parameters for _ in range(6 if route in STREAMS else 1)]
    route = draw(st.sampled_from(weighted))
    properties = parameters[route]
    body: JsonObject = {"model": model, **BASES.get(route, {})}
    if "prompt" in body and draw(st.booleans()):
        body["prompt"] = draw(st.sampled_from(PROMPTS))
    if "temperature" in properties:
        body["temperature"] = draw(st.sampled_from([0, 0, 1, 0.7]))
    if "seed" in properties and draw(st.integers(0, 3)) == 0:
        body["seed"] = draw(st.integers(0, 9))
    if route in STREAMS:
        body["stream"] = draw(st.booleans())
    names = (
        draw(st.lists(st.sampled_from(sorted(properties)), min_size=1, max_size=5, unique=True)) if properties else []
    )
    for name in names:
        # Mostly what is allowed, so that several parameters get as far as the sampler together.
        values = VALUES.get(name) or find_values(name, properties[name])
        body[name] = draw(st.sampled_from(values if draw(st.integers(0, 9)) else JUNK))
    leave_after = draw(st.sampled_from([None, None, None, None, 0, 1, 200]))
    return Request(route, body, leave_after)
