"""What frameworks above the SDKs, and the llm command, do with a server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import instructor
import litellm
import openai
from pydantic import BaseModel, Field

from laguna_serve.scripts.clients.expectations import (
    ASK,
    CHAT_TOOL,
    FEW,
    FORCED,
    KEY,
    LOST,
    MANY,
    MESSAGES,
    MODEL,
    SCHEMA,
    URL,
    Checks,
    expect,
    expect_call,
    expect_pieces,
    expect_text,
    lost,
    read_deltas,
    refused,
)


def langchain_checks(models: Sequence[Any], forced: dict[str, Any], error: type[BaseException]) -> Checks:
    """langchain-openai and langchain-anthropic: a model, and one whose engine is lost."""
    model, broken = models

    def plain() -> str:
        return expect_text(str(model.invoke(ASK).text))

    def streamed() -> str:
        whole = str(model.invoke(ASK).text)
        parts = [str(chunk.text) for chunk in model.stream(ASK)]
        expect_pieces(whole, parts)
        return f"{len(parts)} events"

    def tool_call() -> str:
        bound = model.bind_tools([CHAT_TOOL]).bind(max_tokens=MANY, **forced)
        call = bound.invoke(ASK).tool_calls[0]
        whole = expect_call(call["name"], call["args"])
        gathered: Any = None
        for chunk in bound.stream(ASK):
            gathered = chunk if gathered is None else gathered + chunk
        streamed = gathered.tool_calls[0]
        expect(expect_call(streamed["name"], streamed["args"]) == whole, f"{whole}, got {streamed}")
        return whole

    return {
        "plain": plain,
        "streamed": streamed,
        "tool call": tool_call,
        "unknown model": lambda: refused(error, lambda: model.bind(model="other").invoke(ASK)),
        "engine lost": lambda: lost(lambda: broken.bind(max_tokens=MANY).stream(ASK)),
    }


def litellm_checks(prefix: str) -> Checks:
    """litellm by one of its routes to an OpenAI-compatible server."""
    usual: dict[str, Any] = {
        "model": f"{prefix}/{MODEL}",
        "api_base": f"{URL}/v1",
        "api_key": KEY,
        "max_retries": 0,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": FEW,
    }
    complete: Any = litellm.completion

    def plain() -> str:
        return expect_text(complete(**usual).choices[0].message.content)

    def streamed() -> str:
        whole = complete(**usual).choices[0].message.content
        parts = read_deltas(complete(**usual, stream=True))
        expect_pieces(whole, parts)
        return f"{len(parts)} events"

    def tool_call() -> str:
        message = complete(**{**usual, "max_tokens": MANY}, tools=[CHAT_TOOL], extra_body=FORCED).choices[0].message
        return expect_call(message.tool_calls[0].function.name, message.tool_calls[0].function.arguments)

    broken = {**usual, "api_base": f"{LOST}/v1", "max_tokens": MANY}
    return {
        "plain": plain,
        "streamed": streamed,
        "tool call": tool_call,
        "unknown model": lambda: refused(litellm.NotFoundError, lambda: complete(**{**usual, "model": f"{prefix}/o"})),
        "bad parameter": lambda: refused(litellm.BadRequestError, lambda: complete(**{**usual, "temperature": 99})),
        "engine lost": lambda: lost(lambda: complete(**broken, stream=True)),
    }


def instructor_checks(client: openai.OpenAI) -> Checks:
    """instructor, which asks for an object by a tool or by a schema."""

    class Read(BaseModel):
        """Reads a part of a file."""

        path: str = Field(max_length=8)
        count: int = Field(ge=0, le=99)

    def ask(mode: instructor.Mode, **more: Any) -> str:
        patched: Any = instructor.from_openai(client, mode=mode)
        usual = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": MANY, "max_retries": 0}
        got = patched.chat.completions.create(**usual, response_model=Read, **more)
        expect(isinstance(got, Read), f"a Read, got {got!r}")
        return repr(got)

    # The tool is named, beside which vLLM takes a schema but no regular expression.
    schema = {**SCHEMA["schema"], "pattern": SCHEMA["schema"]["pattern"].replace("read", "Read", 1)}
    schema["pattern"] = schema["pattern"].replace("{1,3}", "{1,2}")
    forced = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}
    return {
        "tool call": lambda: ask(instructor.Mode.TOOLS, extra_body={"response_format": forced}),
        "json schema": lambda: ask(instructor.Mode.JSON_SCHEMA),
    }


def llm_checks(folder: Path) -> Checks:
    """Check the llm command, with the server as an extra OpenAI model."""
    for name, base in (("laguna", URL), ("laguna-lost", LOST)):
        entry = f"- model_id: {name}\n  model_name: {MODEL}\n  api_base: {base}/v1\n  supports_tools: true\n"
        with (folder / "extra-openai-models.yaml").open("a") as file:
            file.write(entry)
    with (folder / "extra-openai-models.yaml").open("a") as file:
        file.write(f"- model_id: other\n  model_name: other\n  api_base: {URL}/v1\n")
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": KEY}

    def ask(model: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", "-m", model, ASK, "-o", "temperature", "0", *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def answer(*more: str) -> str:
        done = ask("laguna", "-o", "max_tokens", str(FEW), *more)
        expect(done.returncode == 0 and done.stdout.strip(), f"text, got {done.stdout!r} {done.stderr[-200:]!r}")
        return repr(done.stdout[:30])

    def failure(model: str, *more: str) -> str:
        done = ask(model, *more)
        expect(done.returncode != 0, f"an error, got {done.stdout[-100:]!r}")
        return done.stderr.strip().splitlines()[-1][:120]

    return {
        "plain": lambda: answer("--no-stream"),
        "streamed": answer,
        "tools offered": lambda: answer("--functions", "def read(path: str) -> str:\n    return path"),
        "unknown model": lambda: failure("other"),
        "engine lost": lambda: failure("laguna-lost", "-o", "max_tokens", str(MANY)),
    }
