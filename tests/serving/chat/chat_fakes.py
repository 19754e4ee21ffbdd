"""Chat templates in the forms that releases are published in, written for these tests, and folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# As the laguna_v2 and laguna_v8 templates behave: the tools in the system part, calls in <tool_call> with <arg_key> and
# <arg_value>, the answer opened by <think> or </think>; {lines} is a line break in v2 and nothing in v8.
LAGUNA = """{{#- a comment -#}}
{{{{- "〈|EOS|〉" -}}}}
{{%- set enable_thinking = enable_thinking | default({default}) -%}}
<system>{{%- if tools -%}}{{%- for tool in tools -%}}{{{{ tool | tojson }}}}{{%- endfor -%}}{{%- endif -%}}</system>
{{%- for message in messages -%}}
  {{%- if message.role == "user" -%}}<user>{{{{ message.content }}}}</user>
  {{%- elif message.role == "assistant" -%}}
    {{%- generation -%}}<assistant></think>{{{{ message.content }}}}
    {{%- for call in message.tool_calls -%}}
      {{{{- "<tool_call>" + call.function.name + "{lines}" -}}}}
      {{%- for name, value in call.function.arguments.items() -%}}
        {{{{- "<arg_key>" ~ name ~ "</arg_key>{lines}<arg_value>" -}}}}
        {{{{- value | tojson(ensure_ascii=False) if value is not string else value -}}}}
        {{{{- "</arg_value>{lines}" -}}}}
      {{%- endfor -%}}</tool_call>
    {{%- endfor -%}}</assistant>
    {{%- endgeneration -%}}
  {{%- elif message.role == "tool" -%}}<tool_response>{{{{ message.content }}}}</tool_response>
  {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}<assistant>{{{{ "<think>" if enable_thinking else "</think>" }}}}{{%- endif -%}}
"""
LAGUNA_V2 = LAGUNA.format(default="false", lines="\\n")
LAGUNA_V8 = LAGUNA.format(default="false", lines="")
LAGUNA_THINKS = LAGUNA.format(default="true", lines="")
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# Lists tools and calls them, but as JSON inside <tool_call>.
HERMES = """{%- for tool in tools or [] -%}{{ tool | tojson }}{%- endfor -%}
{%- for message in messages -%}{{ message.content }}
{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor -%}
{%- endfor -%}"""
REFUSES = "{{ raise_exception('no chats here') }}"
TOKENS = ("<assistant>", "<think>", "</think>")


def write_release(
    folder: Path,
    template: str | None,
    generation: dict[str, Any] | None = None,
    tokens: tuple[str, ...] = TOKENS,
    where: str = "chat_template.jinja",
) -> Path:
    """Adds a chat template, generation_config.json and a tokenizer to a checkpoint folder; returns it."""
    if template is not None and where == "chat_template.jinja":
        (folder / where).write_text(template, encoding="utf-8")
    elif template is not None:
        value = [{"name": "default", "template": template}] if where == "named" else template
        name = "tokenizer_config.json" if where == "named" else where
        (folder / name).write_text(json.dumps({"chat_template": value}), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    added = [{"id": number, "content": token} for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(
        json.dumps({"added_tokens": added, "model": {"vocab": {}}}), encoding="utf-8"
    )
    return folder
