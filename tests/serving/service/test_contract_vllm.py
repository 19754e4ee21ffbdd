"""Tool calls, thoughts and official clients on the real engine, through `laguna serve` and its gateway.

The toy calls no tool by itself: a regular expression, or a schema where an API has none, forces the text of a call, and
a budget ends its thoughts. What is parsed, streamed and translated is vLLM's and the gateway's work on real tokens.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from warm import WarmServe

from laguna_serve.scripts.clients import run
from laguna_serve.scripts.clients.run import CALL, CALL_REGEX, CALL_SCHEMA, open_environment, run_laguna, serve_command

pytestmark = pytest.mark.vllm

TOY = Path(__file__).parents[2] / "toy"
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["path", "count"],
}
READ = {"name": "read", "description": "Reads a file", "parameters": PARAMETERS}
ASK = [{"role": "user", "content": "x = 1"}]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ON, OFF = ({"chat_template_kwargs": {"enable_thinking": on}} for on in (True, False))
# Thoughts long enough that a busy machine, on which vLLM joins the pieces that wait, does not make one piece of them.
BUDGET = 64
CALLED = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "read", "arguments": '{"path": "x", "count": 2}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "y = 2"},
]


def chat(**changes: Any) -> dict[str, Any]:
    tool = {"type": "function", "function": READ}
    return {"messages": ASK, "max_tokens": 160, "temperature": 0, "tools": [tool]} | OFF | changes


def respond(**changes: Any) -> dict[str, Any]:
    tool = {"type": "function", **READ}
    return (
        {"input": "x = 1", "max_output_tokens": 160, "temperature": 0, "store": False, "tools": [tool]} | OFF | changes
    )


def message(**changes: Any) -> dict[str, Any]:
    tool = {"name": "read", "description": "Reads a file", "input_schema": PARAMETERS}
    return {"messages": ASK, "max_tokens": 160, "temperature": 0, "tools": [tool]} | OFF | changes


ONE, TWO = ({"structured_outputs": {"regex": regex}} for regex in (CALL_REGEX, f"sure {CALL_REGEX}{CALL_REGEX}"))
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "call", "schema": CALL_SCHEMA["schema"]}}
NAMED = {"type": "function", "function": {"name": "read"}}
THOUGHT = {**ON, "thinking_token_budget": BUDGET, "min_tokens": BUDGET}
BY_OUTPUT = {"output_config": {"format": CALL_SCHEMA}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "call": (CHAT, chat(**ONE)),
    "two calls": (CHAT, chat(max_tokens=320, **TWO)),
    "auto": (CHAT, chat(tool_choice="auto", **ONE)),
    "none": (CHAT, chat(tool_choice="none", **ONE)),
    "required": (CHAT, chat(tool_choice="required", response_format=AS_SCHEMA)),
    "named": (CHAT, chat(tool_choice=NAMED, response_format=AS_SCHEMA)),
    "result": (CHAT, chat(messages=CALLED, max_tokens=24)),
    "result, another call": (CHAT, chat(messages=CALLED, **ONE)),
    "thought": (CHAT, chat(max_tokens=BUDGET + 24, tools=None, **THOUGHT)),
    "thought, call": (CHAT, chat(max_tokens=BUDGET + 160, **THOUGHT, **ONE)),
    "no thought": (CHAT, chat(max_tokens=24, tools=None)),
    "effort": (CHAT, {"messages": ASK, "max_tokens": 24, "temperature": 0, "reasoning_effort": "low"}),
    "responses call": (RESPONSES, respond(**ONE)),
    "responses thought": (RESPONSES, respond(tools=None, max_output_tokens=2 * BUDGET, **ON)),
    "message": (MESSAGES, message(max_tokens=24)),
    "message call": (MESSAGES, message(**BY_OUTPUT)),
    "message thought": (MESSAGES, message(tools=None, max_tokens=24, **ON)),
}
STREAMED = (
    *("call", "two calls", "result, another call", "thought", "thought, call"),
    *("responses call", "responses thought", "message call", "message thought"),
)
BUDGETED = message(
    tools=None, max_tokens=1025, thinking={"type": "enabled", "budget_tokens": 1024}, stop_sequences=["_"]
)
CLIENTS = ("chat", "responses", "anthropic")
ARMS = ("plain", "drafter", "release")
# As the 2.1 releases have it; the toy is asked to be greedy wherever a request does not say, which shows.
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 4],
    "temperature": 1.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "tool_call_parser": "poolside_v1",
    "reasoning_parser": "poolside_v1",
    "default_chat_template_kwargs": {"enable_thinking": True},
}
UNSAID = {"messages": ASK, "max_tokens": 24}


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer, or the events of a stream."""
    said = {key: value for key, value in body.items() if value is not None}
    data = json.dumps({"model": "teacher", **said}).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json", "x-api-key": "dummy"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return {"refused": f"{error.code} {error.read().decode()}"}
    if not body.get("stream"):
        return json.loads(text)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


class Served:
    """What a server answered: every case whole and streamed, and what it greeted with."""

    def __init__(self, url: str, greeting: str) -> None:
        self.greeting = greeting
        self.clients: dict[str, dict[str, str | None]] = {}
        self.log = ""
        self.whole = {name: post(url, path, body) for name, (path, body) in CASES.items()}
        self.events = {name: post(url, CASES[name][0], CASES[name][1] | {"stream": True}) for name in STREAMED}
        self.budgeted = post(url, MESSAGES, BUDGETED | ON)
        self.unsaid = post(url, CHAT, UNSAID)
        self.unsaid_greedy = post(url, CHAT, {**UNSAID, "temperature": 0})
        counted = post(url, "/v1/messages/count_tokens?beta=true", message(messages=ASK, max_tokens=1))
        self.counted = counted["input_tokens"]
        self.prompt = post(url, "/tokenize", {"messages": CALLED, "tools": chat()["tools"], **OFF})["tokens"]
        self.prompt_text = post(url, "/detokenize", {"tokens": self.prompt})["prompt"]

    def message(self, name: str) -> dict[str, Any]:
        """Of a chat completion."""
        found: dict[str, Any] = self.whole[name]["choices"][0]["message"]
        return found

    def finish(self, name: str) -> str:
        return str(self.whole[name]["choices"][0]["finish_reason"])

    def calls(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Name and arguments of each call of a chat completion."""
        made = [call["function"] for call in self.message(name).get("tool_calls") or []]
        return [(call["name"], json.loads(call["arguments"])) for call in made]

    def deltas(self, name: str) -> list[dict[str, Any]]:
        """Of a chat completion's stream."""
        return [event["choices"][0]["delta"] for event in self.events[name] if event["choices"]]

    def kinds(self, name: str) -> list[str]:
        """The types of a response's items or a message's blocks."""
        return [item["type"] for item in self.whole[name].get("output") or self.whole[name]["content"]]


def check_clients(url: str) -> dict[str, dict[str, str | None]]:
    """What falls short in each check of each official SDK, None where nothing does."""
    module = "laguna_serve.scripts.clients"
    with open_environment(url) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        official = importlib.import_module(f"{module}.official")
        found: dict[str, dict[str, str | None]] = {}
        for client in CLIENTS:
            found[client] = {}
            for name, check in getattr(official, f"list_{client}_checks")().items():
                try:
                    check()
                    found[client][name] = None
                except Exception as error:
                    found[client][name] = f"{type(error).__name__}: {error}"
        for name in ("official", "expectations"):  # they have read this environment
            sys.modules.pop(f"{module}.{name}", None)
        return found


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """The toy alone, with its drafter, and with the generation_config.json of a release."""
    release = tmp_path_factory.mktemp("release") / "teacher"
    shutil.copytree(TOY / "teacher", release)
    (release / "generation_config.json").write_text(json.dumps(GENERATION))
    models = {"plain": [str(TOY / "teacher")], "drafter": [str(TOY / "teacher"), "--draft", str(TOY / "dflash")]}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.ROOT)
        patch.setattr(run, "subprocess", WarmServe)
        for arm, arguments in {**models, "release": [str(release)]}.items():
            folder = tmp_path_factory.mktemp(arm)
            command = serve_command([*arguments, "--eager", "--max-num-seqs", "4"], folder)
            with run_laguna(command, folder) as url:
                found[arm] = Served(url, (folder / "serve.out").read_text())
                found[arm].log = (folder / "engine.log").read_text()
                if arm == "plain":
                    found[arm].clients = check_clients(url)
    return found


@pytest.fixture(params=ARMS)
def served(arms: dict[str, Served], request: pytest.FixtureRequest) -> Served:
    return arms[request.param]


def expect_read(call: tuple[str, dict[str, Any]]) -> None:
    name, arguments = call
    assert name == "read"
    assert list(arguments) == ["path", "count"]
    assert isinstance(arguments["path"], str)
    assert isinstance(arguments["count"], int)


def test_every_request_is_answered(served: Served) -> None:
    for answers in (served.whole, served.events):
        assert {name: found["refused"] for name, found in answers.items() if "refused" in found} == {}


@pytest.mark.parametrize("name", ["call", "auto", "required", "named", "result, another call", "thought, call"])
def test_chat_calls_a_tool(served: Served, name: str) -> None:
    # Of a call that the request itself names, the API says "stop".
    assert served.finish(name) == ("stop" if name == "named" else "tool_calls")
    (call,) = served.calls(name)
    expect_read(call)


def test_chat_calls_two_tools_beside_text(served: Served) -> None:
    assert served.message("two calls")["content"] == "sure "
    assert len(served.calls("two calls")) == 2
    for call in served.calls("two calls"):
        expect_read(call)
    made = served.message("two calls")["tool_calls"]
    assert made[0]["id"] != made[1]["id"]


def test_chat_without_choice_leaves_the_text(served: Served) -> None:
    assert served.calls("none") == []
    assert served.message("none")["content"].startswith(CALL[0])
    assert served.finish("none") == "stop"


@pytest.mark.parametrize("name", ["call", "two calls", "result, another call", "thought, call"])
def test_streamed_call_comes_in_pieces_and_is_the_same(served: Served, name: str) -> None:
    pieces: dict[int, list[dict[str, Any]]] = {}
    for delta in served.deltas(name):
        for piece in delta.get("tool_calls") or []:
            pieces.setdefault(piece["index"], []).append(piece["function"])
    streamed = [
        ("".join(part.get("name") or "" for part in parts), "".join(part.get("arguments") or "" for part in parts))
        for parts in pieces.values()
    ]
    assert [(called, json.loads(arguments)) for called, arguments in streamed] == served.calls(name)
    assert all(len(parts) > 2 for parts in pieces.values())
    text = "".join(delta.get("content") or "" for delta in served.deltas(name))
    assert text == (served.message(name)["content"] or "")
    assert served.events[name][-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("name", ["thought", "thought, call"])
def test_thoughts_are_kept_apart_whole_and_streamed(served: Served, name: str) -> None:
    thoughts = served.message(name)["reasoning"]
    assert thoughts
    parts = [delta["reasoning"] for delta in served.deltas(name) if delta.get("reasoning")]
    assert "".join(parts) == thoughts
    assert len(parts) > 1
    content = "".join(delta.get("content") or "" for delta in served.deltas(name))
    assert content == (served.message(name)["content"] or "")
    assert "think>" not in thoughts + content


def test_thinking_is_the_requests_to_say(served: Served) -> None:
    assert served.message("thought")["content"]
    assert served.message("effort")["reasoning"]
    assert served.message("no thought")["reasoning"] is None
    assert served.message("no thought")["content"]


def test_thinking_by_default_is_the_releases_to_say(arms: dict[str, Served]) -> None:
    for arm, thinks in (("plain", False), ("drafter", False), ("release", True)):
        said = arms[arm].unsaid_greedy["choices"][0]["message"]
        assert bool(said["reasoning"]) is thinks
        assert f"tool calls: on (poolside_v1); thinking: {'on' if thinks else 'off'}" in arms[arm].greeting


def test_greeting_shows_a_chat(served: Served) -> None:
    assert "/v1/chat/completions" in served.greeting.split("try: curl")[1]


def test_generation_defaults_hold_where_a_request_says_nothing(arms: dict[str, Served]) -> None:
    """The release's top_k is 1 here: what is not said is greedy."""
    said, unsaid = (arms["release"].unsaid_greedy, arms["release"].unsaid)
    assert said["choices"][0]["message"] == unsaid["choices"][0]["message"]


def test_tool_result_is_in_the_next_turn(served: Served) -> None:
    text = served.prompt_text
    assert "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>x</arg_value>" in text
    assert "<tool_response>\ny = 2\n</tool_response>" in text
    assert served.message("result")["content"]


def test_responses_call_and_think(served: Served) -> None:
    (call,) = [item for item in served.whole["responses call"]["output"] if item["type"] == "function_call"]
    expect_read((call["name"], json.loads(call["arguments"])))
    events = served.events["responses call"]
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call["arguments"]
    assert len(pieces) > 2
    assert events[-1]["type"] == "response.completed"
    assert served.kinds("responses thought")[0] == "reasoning"
    kinds = [event["type"] for event in served.events["responses thought"]]
    assert kinds.count("response.reasoning_text.delta") > 1
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_messages_use_tools_and_think(served: Served) -> None:
    assert served.kinds("message") == ["text"]
    used = served.whole["message call"]["content"][-1]
    assert (used["type"], served.whole["message call"]["stop_reason"]) == ("tool_use", "tool_use")
    expect_read((used["name"], used["input"]))
    events = served.events["message call"]
    pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == used["input"]
    assert events[-1]["type"] == "message_stop"
    assert served.kinds("message thought") == ["thinking"]
    events = served.events["message thought"]
    started = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert started[0]["type"] == "thinking"
    assert served.counted > 100


def test_messages_take_a_budget_of_thoughts(served: Served) -> None:
    """Stock vLLM refuses it beside this parser: see --reasoning-config in vendor_defaults.py."""
    assert served.budgeted["content"][0]["type"] == "thinking"


def test_system_messages_between_turns_stay_in_place(served: Served) -> None:
    """Else vLLM says so at the start: an agent's every reminder would move to the front, and miss the prefix cache."""
    assert "system-first ordering" not in served.log


@pytest.mark.parametrize("arm", ["drafter", "release"])
def test_answers_are_those_of_the_plain_server(arms: dict[str, Served], arm: str) -> None:
    """Speculation leaves them as they are; so do the sampling defaults of a release, as these requests are greedy."""

    def parts(served: Served, name: str) -> object:
        if CASES[name][0] == CHAT:
            said = served.message(name)
            return said["content"], said["reasoning"], served.calls(name), served.finish(name)
        items = served.whole[name].get("output") or served.whole[name]["content"]
        changing = ("id", "call_id", "signature")
        return [{key: value for key, value in item.items() if key not in changing} for item in items]

    for name in CASES:
        assert parts(arms[arm], name) == parts(arms["plain"], name), name


@pytest.mark.parametrize("client", CLIENTS)
def test_official_python_clients(arms: dict[str, Served], client: str) -> None:
    """The checks of scripts/clients.sh, with the releases that are locked here."""
    found = arms["plain"].clients[client]
    assert len(found) >= 7
    assert {name: said for name, said in found.items() if said is not None} == {}
