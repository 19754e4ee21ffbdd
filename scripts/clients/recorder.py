"""A proxy that notes which requests pass and how they are answered.

One loses its server in every stream; one has another model loaded first, so that the one that is asked for is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from aiohttp import ClientSession, ClientTimeout, web

HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
END_OF_EVENT = b"\n\n"
START_TIMEOUT_S = 60.0
MAX_BODY = 64 << 20
ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One that has been answered; `error` is the beginning of the body of a refusal."""

    method: str
    path: str
    status: int
    error: str = ""


@dataclass(slots=True)
class Recorder:
    """`url` is where it listens; `requests` are in the order of their ends; the next `swaps` find no model."""

    url: str = ""
    requests: list[RecordedRequest] = field(default_factory=list)
    swaps: int = 0


@contextmanager
def record(server: str, cut_after: int | None = None, other: str | None = None) -> Iterator[Recorder]:
    """Keep a proxy in front of a server, in a thread of its own.

    Args:
        server: its URL.
        cut_after: the connection of an event stream ends after that many events, as when an engine dies; or None.
        other: a model that takes the place of the one that is asked for, before each of the recorder's `swaps`.
    """
    recorder, ready, stop = Recorder(), threading.Event(), threading.Event()
    way = _Way(server, cut_after, other)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(recorder, way, ready, stop)), daemon=True)
    thread.start()
    try:
        if not ready.wait(START_TIMEOUT_S):
            raise RuntimeError(f"recorder: expected it to listen within {START_TIMEOUT_S:.0f} s, got silence")
        yield recorder
    finally:
        stop.set()
        thread.join(START_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class _Way:
    """Where requests go, and what befalls them; as `record` was given it."""

    server: str
    cut_after: int | None
    other: str | None


async def _serve(recorder: Recorder, way: _Way, ready: threading.Event, stop: threading.Event) -> None:
    async with ClientSession(auto_decompress=False, timeout=ClientTimeout(total=None)) as session:

        async def handle(request: web.Request) -> web.StreamResponse:
            if way.other is not None and recorder.swaps and request.method == "POST" and request.path in ASKING:
                recorder.swaps -= 1
                await _load(session, way.server, way.other)
            return await _forward(request, session, recorder, way)

        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=1)
        await site.start()
        recorder.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await asyncio.to_thread(stop.wait)
        await runner.cleanup()


async def _load(session: ClientSession, server: str, model: str) -> None:
    """Ask a model for a token, for which it must be loaded. Raises HTTPBadGateway with what the server said."""
    body = msgspec.json.encode({"model": model, "prompt": "a", "max_tokens": 1})
    headers = {"content-type": "application/json"}
    async with session.post(f"{server}/v1/completions", data=body, headers=headers) as answer:
        if answer.status != web.HTTPOk.status_code:
            raise web.HTTPBadGateway(text=f"{model}: {await answer.text()}")


async def _forward(request: web.Request, session: ClientSession, recorder: Recorder, way: _Way) -> web.StreamResponse:
    headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
    body = await request.read()
    async with session.request(
        request.method, way.server + request.raw_path, headers=headers, data=body, allow_redirects=False
    ) as answer:
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        streams = answer.headers.get("content-type", "").startswith("text/event-stream")
        events, beginning = 0, b""
        with contextlib.suppress(ConnectionError):  # a client may leave before the end
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                beginning = beginning or piece
                if streams and way.cut_after is not None:
                    *ends, _ = piece.split(END_OF_EVENT)
                    if events + len(ends) >= way.cut_after:
                        await response.write(END_OF_EVENT.join([*ends[: way.cut_after - events], b""]))
                        _close(request)
                        break
                    events += len(ends)
                await response.write(piece)
        error = beginning[:300].decode(errors="replace") if answer.status >= 400 else ""
        recorder.requests.append(RecordedRequest(request.method, request.path_qs, answer.status, error))
        return response


def _close(request: web.Request) -> None:
    """End the connection without the end of the body; what has been written still goes out."""
    if request.transport is not None:
        request.transport.close()
