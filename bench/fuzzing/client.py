"""Sends made-up requests to an engine and says what is wrong with the answers.

Right is a 200, or a 4xx with an error object in the API's form; wrong is everything else: a 5xx, an error of the
server's inside a stream, a connection that breaks, silence, another answer to the control request than before.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import aiohttp

from laguna_serve.bench.fuzzing.requests import Request

ANSWER_S = 120.0
HEALTH_S = 60.0
CONTROL_PROMPT = "def fib(n):\n    if n"
CONTROL_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """Status (0 without one), whole or partial body, and what is wrong with it, if anything."""

    status: int
    body: bytes
    wrong: str | None


async def send(session: aiohttp.ClientSession, base_url: str, request: Request) -> Answer:
    """One request, to its end or to the place where the client leaves."""
    data = json.dumps(request.body).encode()
    headers = {"Content-Type": "application/json"}
    body = b""
    try:
        async with session.post(base_url + request.route, data=data, headers=headers) as response:
            if request.leave_after is not None:
                while len(body) < request.leave_after and (part := await response.content.readany()):
                    body += part
                if request.leave_after == 0 or len(body) >= request.leave_after:
                    response.close()
                    return Answer(response.status, body, judge_status(response.status))
            body += await response.read()
            return Answer(response.status, body, judge(response.status, response.content_type, body, request.route))
    except TimeoutError:
        return Answer(0, body, f"no answer within {ANSWER_S:.0f} s")
    except (aiohttp.ClientError, OSError) as error:
        return Answer(0, body, f"connection: {type(error).__name__}")


def judge_status(status: int) -> str | None:
    """Say what is wrong with a status alone; 501 says that the model has no such task."""
    return None if status == 200 or status in range(400, 500) or status == 501 else f"status {status}"


def judge(status: int, kind: str, body: bytes, route: str) -> str | None:
    """Say what is wrong with a whole answer; None when nothing is."""
    if (wrong := judge_status(status)) is not None:
        return f"{wrong}: {body[:300].decode(errors='replace')}"
    if kind == "text/event-stream":
        return _judge_events(body)
    if status >= 400:
        return judge_error(body, route)
    return None


def judge_error(body: bytes, route: str) -> str | None:
    """Judge the form of an error: OpenAI's, or Anthropic's on its routes."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"error that is not JSON: {body[:100]!r}"
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not error.get("type"):
        return f"error without message and type: {body[:200]!r}"
    if route.startswith("/v1/messages") and answer.get("type") != "error":
        return f"error that is not Anthropic's: {body[:200]!r}"
    return None


def _judge_events(body: bytes) -> str | None:
    for line in body.split(b"\n"):
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        try:
            event = json.loads(line[6:])
        except ValueError:
            return f"event that is not JSON: {line[:100]!r}"
        error = event.get("error") if isinstance(event, dict) else None
        if isinstance(error, dict) and (error.get("code", 500) or 500) not in range(400, 500):
            return f"error within a stream: {json.dumps(error)[:300]}"
    return None


async def is_healthy(session: aiohttp.ClientSession, base_url: str) -> bool:
    """Whether GET /health says 200."""
    try:
        async with session.get(base_url + "/health", timeout=aiohttp.ClientTimeout(total=HEALTH_S)) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


async def ask_control(session: aiohttp.ClientSession, base_url: str, model: str) -> list[int] | None:
    """Ask for the tokens of a greedy request that is always the same; None where it fails."""
    body = {"model": model, "prompt": CONTROL_PROMPT, "max_tokens": CONTROL_TOKENS, "temperature": 0}
    try:
        async with session.post(base_url + "/v1/completions", json=body | {"return_token_ids": True}) as response:
            answer = await response.json()
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError):
        return None


async def check_batch(
    session: aiohttp.ClientSession, base_url: str, model: str, batch: list[Request], control: list[int]
) -> tuple[list[Answer], list[str]]:
    """Send requests together. Returns the answers and everything that is wrong, in words."""
    answers = await asyncio.gather(*(send(session, base_url, request) for request in batch))
    wrong = [f"{r.route}: {a.wrong}" for r, a in zip(batch, answers, strict=True) if a.wrong is not None]
    if not await is_healthy(session, base_url):
        return answers, ["death: /health does not answer 200", *wrong]
    tokens = await ask_control(session, base_url, model)
    if tokens != control:
        wrong.insert(0, f"control: expected {control}, got {tokens}")
    return answers, wrong


def open_session() -> aiohttp.ClientSession:
    """Open a client session for `check_batch`."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
