"""What a chat template can do, found out by rendering it: tool calls, thinking, and what it does by default.

Rendered as transformers renders it (5.19, utils/chat_template_utils.py: an immutable sandbox, trimmed blocks, loop
controls, the `generation` tag), without transformers. A template is asked, not read: what counts is what comes out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.results import JsonObject

QUESTION = {"role": "user", "content": "laguna probe"}
TOOL_NAME, ARGUMENT = "laguna_probe_tool", "laguna_probe_argument"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {ARGUMENT: {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": TOOL_NAME, "arguments": {ARGUMENT: "x"}}}],
}
# A call as the poolside_v1 tool parser reads it (vLLM 0.26 to 0.33, tool_parsers/poolside_v1_tool_parser.py).
POOLSIDE_CALL = re.compile(
    rf"<tool_call>\s*{TOOL_NAME}\s*<arg_key>\s*{ARGUMENT}\s*</arg_key>\s*<arg_value>x</arg_value>"
)
THINK = "<think>"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template does.

    Attributes:
        tools: it lists the tools of a request and writes calls in the form that poolside_v1 parses.
        thinking: `enable_thinking` makes it open the answer with `<think>`.
        thinks_by_default: it does so when a request does not say.
        error: why it could not be rendered, or None.
    """

    tools: bool = False
    thinking: bool = False
    thinks_by_default: bool = False
    error: str | None = None


def read_template(folder: Path) -> str | None:
    """Read the checkpoint's chat template, from where transformers looks for it; None when it has none.

    Raises:
        CheckpointError: tokenizer_config.json or chat_template.json cannot be read.
    """
    template = read_file(folder / "chat_template.jinja")
    if template is not None:
        return template
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_object(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def read_file(path: Path) -> str | None:
    """Read a checkpoint's text; None when there is no such file. Raises CheckpointError when it is something else."""
    if not os.path.lexists(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        got = f"a link to {os.readlink(path)}, which is not there"
    except OSError as error:
        got = (error.strerror or type(error).__name__).lower()
    except UnicodeDecodeError as error:
        got = f"other bytes ({error.reason})"
    raise CheckpointError(f"{path}: expected a file of UTF-8, got {got}; fetch it again")


def read_object(path: Path) -> JsonObject:
    """Read a JSON object, empty when there is no such file. Raises CheckpointError when it is something else."""
    text = read_file(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got another text ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}; fetch it again")
    return value


def probe_template(template: str) -> Abilities:
    """Probe what the template can do. One that fails to render a plain question can do nothing, and says why."""
    try:
        render = compile_template(template)
        plain = render([QUESTION])
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        return Abilities(error=str(error) or type(error).__name__)
    return Abilities(
        tools=_can_call_tools(render),
        thinking=_opens_thinking(_attempt(render, [QUESTION], enable_thinking=True))
        and not _opens_thinking(_attempt(render, [QUESTION], enable_thinking=False)),
        thinks_by_default=_opens_thinking(plain),
    )


def compile_template(template: str) -> Callable[..., str]:
    """`render(messages, **variables)`, with the generation prompt."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    compiled = environment.from_string(template)

    def render(messages: list[JsonObject], **variables: Any) -> str:
        return compiled.render(messages=messages, add_generation_prompt=True, **variables)

    return render


def _can_call_tools(render: Callable[..., str]) -> bool:
    listed = _attempt(render, [QUESTION], tools=[TOOL])
    called = _attempt(
        render, [QUESTION, CALL, {"role": "tool", "content": "y", "tool_call_id": "call_0"}], tools=[TOOL]
    )
    return TOOL_NAME in listed and POOLSIDE_CALL.search(called) is not None


def _attempt(render: Callable[..., str], messages: list[JsonObject], **variables: Any) -> str:
    """Render; nothing comes out when the template refuses."""
    try:
        return render(messages, **variables)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return ""


def _opens_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Dump a value as transformers' filter does: unlike Jinja's own it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what the assistant said, renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Parse the tag for jinja2: the block's body, without what the tag would do with it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
