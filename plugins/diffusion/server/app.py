"""The routes: completions and chats, models, tokens, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from laguna_serve.plugins.diffusion.engine.loop import Engine
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from laguna_serve.plugins.diffusion.server.choices import Defaults, make_requests, read_chat, read_prompts
from laguna_serve.plugins.diffusion.server.errors import ApiError, describe_invalid
from laguna_serve.plugins.diffusion.server.generation import Generation
from laguna_serve.plugins.diffusion.server.loading import Served
from laguna_serve.plugins.diffusion.server.texts import TextStream
from laguna_serve.plugins.diffusion.server.writing.answers import EventResponse, Writer, answer_whole
from laguna_serve.plugins.diffusion.server.writing.forms import DetokenizeAnswer, ModelCard, ModelList, TokenizeAnswer
from laguna_serve.plugins.diffusion.server.writing.logprobs import LogprobWriter

# nginx's code for a client that has left; nobody reads it.
LEFT = 499


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes answer with. `root`: the model's folder, as /v1/models says."""

    engine: Engine
    served: Served
    defaults: Defaults
    model: str
    root: str
    started_s: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served here."""
        if name is not None and name != self.model:
            raise ApiError(404, f"The model `{name}` does not exist.", "model")


def make_app(service: Service) -> FastAPI:
    """Make the application of a service."""
    app = FastAPI(title="laguna diffusion", docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_failure)
    _add_generating(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    return app


def _add_generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        return await _generate(service, body, read_prompts(body, service.served), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        return await _generate(service, body, [read_chat(body, service.served)], request)


def _add_tokens(app: FastAPI, service: Service) -> None:
    texts = service.served.texts

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> TokenizeAnswer:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: expected it or messages, got neither or both; send one", "prompt")
        ids = texts.encode(body.prompt or "", special=body.add_special_tokens)
        if body.messages is not None:
            kwargs = body.chat_template_kwargs or {}
            try:
                ids = texts.render_chat(body.messages, prompt_for_answer=body.add_generation_prompt, kwargs=kwargs)
            except DiffusionError as error:
                raise ApiError(400, str(error), str(error).partition(":")[0]) from None
        strings = texts.list_tokens(ids) if body.return_token_strs else None
        length = service.served.max_model_len
        return TokenizeAnswer(count=len(ids), max_model_len=length, tokens=ids, token_strs=strings)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> DetokenizeAnswer:
        service.check_model(body.model)
        size = service.served.vocab_size
        if not all(0 <= token < size for token in body.tokens):
            raise ApiError(400, f"tokens: expected ids from 0 to {size - 1}, got others; check them", "tokens")
        return DetokenizeAnswer(prompt=texts.decode(body.tokens, skip_special=False))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        length = service.served.max_model_len
        card = ModelCard(id=service.model, created=service.started_s, root=service.root, max_model_len=length)
        return ModelList(data=[card])

    @app.get("/health")
    async def health() -> Response:
        if service.engine.alive:
            return Response()
        return ApiError(503, f"engine: {service.engine.cause or 'it has been stopped'}").respond()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _generate(service: Service, body: Body, prompts: Sequence[Sequence[int]], request: Request) -> Response:
    """Answer a request, whole or as a stream; a client that leaves ends what it asked for."""
    served = service.served
    requests = make_requests(body, prompts, served, service.defaults)
    streams = [TextStream(served.texts, body.stops, skip_special=body.skip_special_tokens) for _ in requests]
    generation = Generation(service.engine, requests, streams, served.stop)
    counted = sum(map(len, prompts))
    logprobs = LogprobWriter(served.texts, by_id=bool(body.return_tokens_as_token_ids))
    writer = Writer(body, service.model, logprobs, [made.canvas.prompt for made in requests], counted)
    generation.submit()
    if body.stream:
        return EventResponse(writer, generation)
    with generation:
        work = asyncio.ensure_future(answer_whole(writer, generation))
        gone = asyncio.ensure_future(_wait_until_left(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=LEFT)
            return Response(work.result(), media_type="application/json")
        finally:
            work.cancel()
            gone.cancel()


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.respond()


async def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return describe_invalid(error).respond()


async def _answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail)).respond()


async def _answer_failure(_: Request, error: Exception) -> Response:
    """Answer for a defect of ours; it is logged by who calls this."""
    return ApiError(500, f"server: {type(error).__name__}").respond()
