"""What the SDKs of OpenAI and Anthropic do with a server: a check raises when it is not as users expect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai

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
    PARAMETERS,
    SCHEMA,
    THINK,
    TOOL,
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


def open_openai(base: str) -> openai.OpenAI:
    """Open a client that tries once."""
    return openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0)


def expect_models(client: openai.OpenAI | anthropic.Anthropic) -> str:
    """Expect the served model in the list."""
    names = [model.id for model in client.models.list()]
    expect(MODEL in names, f"{MODEL} in the list, got {names}")
    return str(names)


def list_chat_checks() -> Checks:
    """Chat completions of the OpenAI SDK."""
    client, broken = open_openai(URL), open_openai(LOST)
    create: Any = client.chat.completions.create
    usual: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": FEW}

    def plain() -> str:
        return expect_text(create(**usual).choices[0].message.content)

    def streamed() -> str:
        whole = create(**usual)
        chunks = list(create(**usual, stream=True, stream_options={"include_usage": True}))
        expect_pieces(whole.choices[0].message.content, read_deltas(chunks))
        # Of answers that end by themselves, too, which depends on how a processor rounds.
        wanted, said = whole.usage.completion_tokens, chunks[-1].usage
        expect(0 < said.completion_tokens == wanted <= FEW, f"usage of {wanted} tokens, got {said}")
        return f"{len(chunks)} events"

    def tool_call() -> str:
        call = {**usual, "max_tokens": MANY, "tools": [CHAT_TOOL], "extra_body": FORCED}
        choice = create(**call).choices[0]
        expect(choice.finish_reason == "tool_calls", f"finish_reason tool_calls, got {choice.finish_reason}")
        function = choice.message.tool_calls[0].function
        whole = expect_call(function.name, function.arguments)
        deltas = [chunk.choices[0].delta for chunk in create(**call, stream=True) if chunk.choices]
        pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
        streamed = expect_call(pieces[0].name, "".join(piece.arguments or "" for piece in pieces))
        expect(streamed == whole and len(pieces) > 2, f"{whole} in pieces, got {streamed} in {len(pieces)}")
        return whole

    def thinking() -> str:
        message = create(**{**usual, "extra_body": THINK}).choices[0].message
        expect(message.reasoning, "thoughts, got none")
        return repr(message.reasoning[:30])

    return {
        "models": lambda: expect_models(client),
        "plain": plain,
        "streamed": streamed,
        "tool call": tool_call,
        "thinking": thinking,
        "unknown model": lambda: refused(openai.NotFoundError, lambda: create(**{**usual, "model": "other"})),
        "bad parameter": lambda: refused(openai.BadRequestError, lambda: create(**{**usual, "temperature": 99})),
        "engine lost": lambda: lost(lambda: _create(broken)(**{**usual, "max_tokens": MANY}, stream=True)),
    }


def _create(client: Any) -> Any:
    return client.chat.completions.create


def list_responses_checks() -> Checks:
    """List the checks of the OpenAI SDK's Responses."""
    client, broken = open_openai(URL), open_openai(LOST)
    create: Any = client.responses.create
    usual: dict[str, Any] = {"model": MODEL, "input": ASK, "temperature": 0, "max_output_tokens": FEW, "store": False}
    tool: Any = {"type": "function", **TOOL}

    def plain() -> str:
        response = create(**usual)
        expect(response.output_text, "text, got none")
        return f"{response.status}, {response.output_text[:30]!r}"

    def streamed() -> str:
        whole = create(**usual).output_text
        events = list(create(**usual, stream=True))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        expect(text == whole, f"{whole!r}, got {text!r}")
        expect(events[-1].type in ("response.completed", "response.incomplete"), f"an end, got {events[-1].type}")
        return f"{len(events)} events, the last {events[-1].type}"

    def tool_call() -> str:
        call = {**usual, "max_output_tokens": MANY, "tools": [tool], "extra_body": FORCED}
        made = [item for item in create(**call).output if item.type == "function_call"]
        expect(made, "a function_call, got none")
        whole = expect_call(made[0].name, made[0].arguments)
        events = list(create(**call, stream=True))
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        expect(expect_call("read", "".join(pieces)) == whole, f"{whole} in pieces, got {pieces}")
        return whole

    def thinking() -> str:
        response = create(**{**usual, "max_output_tokens": MANY}, reasoning={"effort": "medium"})
        kinds = [item.type for item in response.output]
        expect("reasoning" in kinds, f"a reasoning item, got {kinds}")
        return str(kinds)

    return {
        "plain": plain,
        "streamed": streamed,
        "tool call": tool_call,
        "thinking": thinking,
        "unknown model": lambda: refused(openai.NotFoundError, lambda: create(**{**usual, "model": "other"})),
        "bad parameter": lambda: refused(openai.BadRequestError, lambda: create(**{**usual, "temperature": 99})),
        "engine lost": lambda: lost(
            lambda: _until_failed(broken.responses.create(**{**usual, "max_output_tokens": MANY}, stream=True))
        ),
    }


def _until_failed(events: Any) -> Iterator[object]:
    """Raise where a response failed: the API's own way of saying so is an event, not an exception."""
    for event in events:
        if event.type in ("error", "response.failed"):
            raise openai.APIError(event.type, request=None, body=None)  # type: ignore[arg-type]
        yield event


def list_anthropic_checks() -> Checks:
    """Messages of the Anthropic SDK."""
    client, broken = (anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0) for base in (URL, LOST))
    create: Any = client.messages.create
    # Newer releases have no argument for the temperature.
    greedy = {"temperature": 0}
    usual: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": FEW, "extra_body": greedy}
    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": PARAMETERS}
    call = {**usual, "max_tokens": MANY, "tools": [tool], "extra_body": {**greedy, "output_config": {"format": SCHEMA}}}

    def plain() -> str:
        return expect_text(create(**usual).content[0].text)

    def streamed() -> str:
        whole = create(**usual).content[0].text
        with client.messages.stream(**usual) as stream:
            text = "".join(stream.text_stream)
        expect(text == whole, f"{whole!r}, got {text!r}")
        return f"{len(text)} characters"

    def tool_call() -> str:
        message = create(**call)
        used = [block for block in message.content if block.type == "tool_use"]
        expect(used and message.stop_reason == "tool_use", f"tool_use, got {message.stop_reason}: {message.content}")
        whole = expect_call(used[0].name, used[0].input)
        with client.messages.stream(**call) as stream:
            final: Any = stream.get_final_message()
        streamed = [block for block in final.content if block.type == "tool_use"]
        expect(streamed and expect_call(streamed[0].name, streamed[0].input) == whole, f"{whole}, got {final.content}")
        return whole

    def thinking() -> str:
        body = {**greedy, "chat_template_kwargs": {"enable_thinking": True}}
        budget = {"type": "enabled", "budget_tokens": 1024}  # the API's smallest
        message = create(**{**usual, "max_tokens": 1040, "extra_body": body}, thinking=budget)
        expect(message.content[0].type == "thinking", f"a thinking block, got {message.content}")
        return repr(message.content[0].thinking[:30])

    def count_tokens() -> str:
        return str(client.messages.count_tokens(model=MODEL, messages=MESSAGES, tools=[tool]).input_tokens)  # type: ignore[list-item]

    def beta() -> str:
        system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
        message = client.beta.messages.create(**usual, system=system, betas=["prompt-caching-2024-07-31"])
        return f"{message.usage.input_tokens} tokens"

    return {
        "models": lambda: expect_models(client),
        "plain": plain,
        "streamed": streamed,
        "tool call": tool_call,
        "thinking": thinking,
        "count_tokens": count_tokens,
        "beta, cache_control": beta,
        "unknown model": lambda: refused(anthropic.NotFoundError, lambda: create(**{**usual, "model": "other"})),
        "bad parameter": lambda: refused(
            anthropic.BadRequestError, lambda: create(**{**usual, "extra_body": {"temperature": 99}})
        ),
        "engine lost": lambda: lost(lambda: broken.messages.create(**{**usual, "max_tokens": MANY}, stream=True)),
    }
