"""Takes requests over HTTP, finds their model's replicas, and tries another one where one is lost before it answers.

A request that an engine had when it died is tried once more and no oftener: it may be what killed it.

Which replica has a request is Ray's own router's to say. Once a client has been sent anything, an answer that breaks
off ends in its API's own error, as the gateway's does: a second half from elsewhere would be another sample.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict

import aiohttp
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from laguna_serve.serving.cluster.messages import AnswerHead, Ask, NewWeights, read_prompt
from laguna_serve.serving.cluster.replica import ReplicaUnwellError
from laguna_serve.serving.gateway.engines.update import PauseMode, Update
from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.sse import EventStream, frame_events
from laguna_serve.serving.kit.results import JsonObject

# Waits before each further try: together longer than Ray needs to strike off a replica that has died.
RETRIES_S = (0.1, 0.5, 1.0, 2.0, 4.0)
# What a replica's own gateway says when its engine is lost, before the answer has begun; and vLLM as it dies.
LOST_STATUSES = frozenset((502, 503))
LAST_WORDS = b"EngineCore encountered an issue"
LOST = (RayError, RayServeException, ReplicaUnwellError, aiohttp.ClientError, OSError)
# Of these, what is said before a request is with an engine: there is no replica, or it has no engine.
UNREACHED = (RayServeException, ReplicaUnwellError)
MAX_BODY_BYTES = 32 << 20
# Ray's own HTTP server says these, the id being the one that the replica got.
SAID_BY_RAY = frozenset((b"content-length", b"date", b"server", b"x-request-id"))


class UpdateBody(Update):
    """The body of POST /admin/update_weights: as the gateway's, without a roll-back, which needs none here."""

    mode: PauseMode = "keep"
    digests: bool = False


class LostError(Exception):
    """A replica was lost before its answer began. `reached`: its engine may have had the request."""

    def __init__(self, *, reached: bool) -> None:
        super().__init__()
        self.reached = reached


class Ingress:
    """The application's front. `replicas` and `keeper` are Ray's handles; there is no keeper without new weights.

    `digest` is the SHA-256 of the key for updates over HTTP; None: there are none.
    """

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], keeper: DeploymentHandle | None, digest: str | None
    ) -> None:
        self._keeper, self._digest = keeper, digest
        self._replicas = {name: handle.options(stream=True) for name, handle in replicas.items()}
        self._started = int(time.time())

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        path = request.url.path
        try:
            if path in ("/health", "/ping") and request.method in ("GET", "HEAD"):
                return Response()
            if path == "/v1/models" and request.method == "GET":
                return JSONResponse(self._list_models())
            if path == "/admin/update_weights":
                return await self._update(request)
            return await self._relay(request)
        except GatewayError as error:
            return _answer_error(error, path)

    def _list_models(self) -> JsonObject:
        about = {"object": "model", "created": self._started, "owned_by": "laguna"}
        return {"object": "list", "data": [{"id": name, **about} for name in self._replicas]}

    async def _relay(self, request: Request) -> Response:
        body = await _read_body(request)
        handle, read = self._find(request, body)
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        prompt = read_prompt(read, request.url.path)
        ask = Ask(request.method, target, [(name, value) for name, value in request.headers.raw], body, prompt)
        reached = False
        for wait_s in (*RETRIES_S, None):
            try:
                return await self._try(handle, ask, request.url.path)
            except BackPressureError:
                raise errors.contended() from None
            except LostError as lost:
                if wait_s is None or (lost.reached and reached):
                    raise errors.engine_lost() if lost.reached else errors.not_ready() from None
                reached = reached or lost.reached
                await asyncio.sleep(wait_s)
        raise AssertionError("the last try answers or raises")

    async def _try(self, handle: DeploymentHandle, ask: Ask, path: str) -> Response:
        """Ask one replica, until the answer has begun, or is there whole. Raises LostError."""
        pieces = handle.ask.remote(ask)
        try:
            head: AnswerHead = await anext(pieces)
            if head.status in LOST_STATUSES:
                raise LostError(reached=head.status == 502)
            headers = dict(head.headers)
            events = frame_events(path, head.headers, headers)[0] if head.streamed else None
            first = b""
            while events is not None and not first:
                first = events.take(await anext(pieces))
            whole = b"" if events is not None else b"".join([piece async for piece in pieces])
        except BackPressureError:
            raise
        except StopAsyncIteration:
            raise LostError(reached=True) from None
        except LOST as error:
            raise LostError(reached=not isinstance(error, UNREACHED)) from None
        if _is_dying(head, first or whole):
            raise LostError(reached=True)
        if events is None:
            return _answer(Response(whole, head.status), head)
        return _answer(StreamingResponse(_go_on(first, pieces, events, path), head.status), head)

    def _find(self, request: Request, body: bytes) -> tuple[DeploymentHandle, Mapping[str, object]]:
        """Find the replicas of a request's model, and read its body. Raises GatewayError."""
        try:
            read = json.loads(body) if body else {}
        except (ValueError, RecursionError):
            raise errors.bad_request("The body is not JSON.") from None
        if not isinstance(read, dict):
            raise errors.bad_request("The body is not a JSON object.")
        name = read.get("model")
        if name is None and len(self._replicas) == 1:
            name = next(iter(self._replicas))
        if not isinstance(name, str):
            raise errors.bad_request("The model is missing.", param="model")
        if name not in self._replicas:
            raise errors.unknown_model(name)
        return self._replicas[name], read

    async def _update(self, request: Request) -> Response:
        """Give a model's replicas new weights. There is no such route without a key for it."""
        digest = self._digest
        if digest is None or self._keeper is None or request.method != "POST":
            raise errors.unknown_path(request.method, request.url.path)
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(given.strip().encode("latin-1")).hexdigest()
        if kind.lower() != "bearer" or not hmac.compare_digest(found, digest):
            raise errors.wrong_key() if given else errors.missing_key()
        try:
            body = UpdateBody.model_validate_json(await _read_body(request))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise errors.bad_request(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        name = request.query_params.get("model") or next(iter(self._replicas))
        if name not in self._replicas:
            raise errors.unknown_model(name)
        new = NewWeights(body.update, body.weight_version, body.draft_update, body.draft_version, body.digests)
        try:
            report = await self._keeper.update.remote(name, new, body.mode)
        except ValueError as error:
            raise errors.bad_request(str(error)) from None
        return JSONResponse(asdict(report), 200 if report.outcome == "updated" else 502)


def _is_dying(head: AnswerHead, begun: bytes) -> bool:
    """Say whether an answer begins in vLLM's last words, not in a model's."""
    return LAST_WORDS in begun and (head.status == 500 or begun.startswith(b'data: {"error"'))


async def _go_on(first: bytes, pieces: AsyncIterator[bytes], events: EventStream, path: str) -> AsyncIterator[bytes]:
    """Pass the events of an answer, whole ones alone; one that breaks off ends in an error."""
    yield first
    try:
        async for piece in pieces:
            if passed := events.take(piece):
                yield passed
    except LOST:
        yield events.render_error(errors.engine_lost(), path)
        return
    if rest := events.end():
        yield rest


async def _read_body(request: Request) -> bytes:
    """Read a body. Raises GatewayError: it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise errors.body_too_large(MAX_BODY_BYTES)
    return bytes(body)


def _answer(response: Response, head: AnswerHead) -> Response:
    """Give a response the engine's headers; its length is the response's own."""
    ours = [(name, value) for name, value in response.raw_headers if name == b"content-length"]
    response.raw_headers = [(name, value) for name, value in head.headers if name not in SAID_BY_RAY] + ours
    return response


def _answer_error(error: GatewayError, path: str) -> Response:
    response = Response(error.body(path), error.status)
    response.raw_headers = [*error.headers(), (b"content-length", str(len(error.body(path))).encode())]
    return response
