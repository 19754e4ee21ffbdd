"""Values for the parameters of the engine's API: the documented ranges, their edges, and what nobody should send.

`VALUES` has the parameters whose meaning matters; everything else gets what its schema says and `JUNK`.
"""

from __future__ import annotations

import math
from typing import Any

from laguna_serve.serving.kit.results import JsonObject

NAN, INF = math.nan, math.inf
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, -(2**31) - 1, 2**63, 2**64, 10**30, 0.5, 1e308, -1e308, NAN, INF, -INF, 1e-300,
    "", "x", "0", "\ud800", "\x00", "\U0001f600" * 50, [], {}, [[]], [None], {"a": {}}, [0] * 5000, ["x"] * 500,
]  # fmt: skip
CHARACTERS = "def f(x):\n    return x\n"


def nest(depth: int, key: str | None = None) -> Any:
    """Nest a list, or an object under `key`, in itself `depth` times."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


def nest_schema(depth: int) -> JsonObject:
    """Make a JSON schema of objects in objects."""
    schema: JsonObject = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "string", "maxLength": 5}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, {}, True, False,
    {"type": "array", "minItems": 10**9}, {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": 10**9}, {"type": "string", "minLength": -1},
    {"type": "integer", "minimum": -(10**30), "maximum": 10**30}, {"type": "number", "multipleOf": 1e-300},
    {"type": "integer", "minimum": 10, "maximum": 1}, {"enum": []}, {"enum": [str(i) for i in range(3000)]},
    {"const": NAN},
    {"$ref": "#"}, {"$ref": "#/$defs/none"}, {"$ref": "http://127.0.0.1:9/schema"}, {"$ref": 3},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"t": {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"},
    {"type": "string", "pattern": "(a|aa)+$"}, {"type": "string", "pattern": "["}, {"type": "string", "format": "date"},
    {"type": "object", "patternProperties": {"(.*)*": {}}}, {"type": "object", "minProperties": 10**9},
    *({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(n)}} for n in (400, 1000, 3000)),
    {"anyOf": [{"type": "integer"}] * 300}, {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"not": {}},
    {"type": "nonsense"}, {"type": ["string", "null"]}, nest_schema(20), nest_schema(150), "{", "", "[]", "null",
    {"type": "object", "properties": {"\ud800": {}}}, {"type": "object", "properties": []},
    {"items": 5, "type": "array"},
]  # fmt: skip
REGEXES = [
    "[a-z]{3,9} = [0-9]+", "", " ", "(a|aa)+$", "((((.*)*)*)*)*", "(a{1,500}){1,500}", "a{0,100000}",
    "a{1000000000}", "[",
    "(", "*", "\\", "(?=a)b", "(?P<x>a)(?P=x)", "\\1", "\\p{L}+", "\x00", "\ud800", "^$", "[^\\s\\S]", "a" * 20000,
    "(" * 300 + ")" * 300, ".{5,3}", "[z-a]", "\\u{110000}",
]  # fmt: skip
GRAMMARS = [
    'root ::= "a" root | "b"', "root ::= root", 'root ::= root "a"', 'start: "a"', "", " ", "root ::= nothing", "x ::=",
    'root ::= "' + "a" * 10000 + '"', "root ::= " + "(" * 300 + '"a"' + ")" * 300, 'root ::= [^\\x00-\\U0010ffff]',
    'root ::= ("a"?){100000}', "\x00",
]  # fmt: skip
CHOICES: list[Any] = [
    ["yes", "no"],
    [],
    [""],
    ["a", "a"],
    ["x" * 20000],
    [str(i) for i in range(3000)],
    ["\ud800"],
    "yes",
]
STRUCTURED: list[Any] = (
    [{"json": schema} for schema in SCHEMAS]
    + [{"regex": regex} for regex in REGEXES]
    + [{"grammar": grammar} for grammar in GRAMMARS]
    + [{"choice": choice} for choice in CHOICES]
    + [
        {"json_object": True}, {"json_object": False}, {"json_object": True, "regex": "a"}, {},
        {"structural_tag": "{}"},
        {"structural_tag": '{"type": "structural_tag", "format": {"type": "any_text"}}'}, {"structural_tag": ""},
        {"json": {"type": "integer"}, "whitespace_pattern": "["}, {"json": {}, "disable_any_whitespace": True},
        {"regex": "a", "_backend": "outlines"}, {"regex": "a", "_backend": "nonsense"},
    ]
)  # fmt: skip
FORMATS: list[Any] = [
    {"type": kind} for kind in ("text", "json_object", "json_schema", "structural_tag", "nonsense")
] + [{"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in SCHEMAS]
TOOLS: list[Any] = [
    [{"type": "function", "function": {"name": "f", "parameters": schema}}] for schema in (*SCHEMAS[:3],
        *SCHEMAS[17:23])
] + [
    [], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}], [{"type": "nonsense"}],
    [{"type": "function", "function": {"name": f"f{i}", "parameters": SCHEMAS[0]}} for i in range(100)],
    [{"name": "f", "input_schema": SCHEMAS[0]}], [{"name": "f", "input_schema": {"$ref": "#"}}],
]  # fmt: skip
MESSAGES: list[Any] = [
    [{"role": "user", "content": CHARACTERS}], [], [{}], [{"role": "user"}], [{"role": "nonsense", "content": "x"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": ""}], [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "nonsense"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
    [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}],
    [{"role": "system", "content": "x"}], [{"role": "assistant", "content": "x"}], [{"role": "tool", "content": "x"}],
    [{"role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
     {"role": "user", "content": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": "x"}] * 300, [{"role": "user", "content": CHARACTERS * 40}],
    [{"role": "user", "content": CHARACTERS * 4000}], [{"role": "user", "content": "<|endoftext|></s><s>[INST]"}],
]  # fmt: skip
TEMPLATES: list[Any] = [
    "{{ messages[0].content }}", "", "{{", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('x') }}", "{{ 'x' * 10**10 }}", "{{ nothing.at.all }}", "{% include 'x' %}",
]  # fmt: skip
TOKENS: list[Any] = [[5], [5, 6, 7] * 20, [], [0], [511], [512], [-1], [2**31], [2**63], [2**64], [1.5], ["x"], [[5]]]
PROMPTS: list[Any] = [
    CHARACTERS, "", " ", "\x00", "\ud800", "\U0001f600" * 20, CHARACTERS * 40, CHARACTERS * 100, CHARACTERS * 400,
    CHARACTERS * 20000, *TOKENS, [5] * 300, [5] * 2039, [5] * 2040, [5] * 2041, [5] * 2046, [5] * 2047, [5] * 2048,
    [5] * 2049, [5] * 20000, [[5, 6], [7]], [[]], [[5], []], ["a", "b"], ["a", [5]], ["a"] * 40, [CHARACTERS * 60] * 6,
]  # fmt: skip
COUNTS: list[Any] = [0, 1, 2, 5, 20, 21, 511, 512, 513, -1, -2, 2**31, 2**63, 1.5]
VALUES: dict[str, list[Any]] = {
    "n": [0, 1, 2, 5, 16, 17, 128, 129, 1000, 10**6, 10**9, 2**63, -1, 1.5],
    "best_of": [0, 1, 2, 10**9, -1],
    "max_tokens": [0, 1, 2, 16, 64, 2047, 2048, 2049, 10**9, 2**63, 2**64, -1, 1.5],
    "min_tokens": [0, 1, 8, 2047, 10**9, 2**63, -1],
    "temperature": [0, 1e-9, 1e-6, 1e-3, 0.5, 1, 2, 5, 1e30, 1e308, -1, NAN, INF],
    "top_p": [0, 1e-9, 1e-3, 0.1, 0.9, 0.999, 1, 1.1, -1, NAN],
    "top_k": [-1, 0, 1, 2, 20, 511, 512, 513, 10**6, 2**31, 2**63, -2, 1.5],
    "min_p": [0, 1e-9, 1e-5, 0.05, 0.5, 1, 1.1, -1, NAN],
    "seed": [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64, 1.5],
    "presence_penalty": [-2, -1, 0, 1, 2, 2.1, 1e30, NAN, INF],
    "frequency_penalty": [-2, -1, 0, 1, 2, 2.1, -1e30, NAN],
    "repetition_penalty": [1e-30, 1e-9, 0.01, 0.5, 1, 1.2, 10, 1e9, 1e38, 1e308, 0, -1, NAN, INF],
    "length_penalty": [0, 1, -1, 1e308, NAN],
    "logit_bias": [
        {}, {"5": 1}, {"5": -100}, {"5": 100, "6": -100}, {"5": 101}, {"511": 100}, {"512": 1}, {"-1": 1}, {"x": 1},
        {"5": NAN}, {"5": INF}, {"5": 1e30}, {"5": None}, {str(2**63): 1}, {str(i): -100 for i in range(512)},
        {str(i): 1 for i in range(300)}, {str(i): 1 for i in range(20000)},
    ],
    "stop": ["\n", "", ["\n"], [""], ["\n", " "], ["a"] * 5, ["a"] * 1000, ["x" * 100000], "\ud800", "\x00",
        ["é", "👍"]],
    "stop_token_ids": [[], [5], list(range(512)), [512], [-1], [2**31], [2**63], [1.5], ["5"], [5] * 10000],
    "bad_words": [["self"], [""], [" "], ["\n"], ["self", "return"], ["x" * 5000], [f"w{i}" for i in range(500)], [5]],
    "allowed_token_ids": [[], [5], [5, 5], list(range(100, 400)), [-1], [512], [2**40], [2**64], [5] * 10000],
    "logprobs": [*COUNTS, True, False],
    "top_logprobs": COUNTS,
    "prompt_logprobs": [*COUNTS, True],
    "logprob_token_ids": [[], [5], [5, 6, 7], [5, 5], list(range(128)), list(range(129)), [-1], [512], [2**63]],
    "prompt_logprob_token_ids": [[], [[5]], [[5, 6]] * 10, [[512]], [[]], [5]],
    "truncate_prompt_tokens": [-1, 0, 1, 4, 2047, 2048, 10**9, -2],
    "truncation_side": ["left", "right", "middle"],
    "structured_outputs": STRUCTURED,
    "response_format": FORMATS,
    "tools": TOOLS,
    "tool_choice": ["none", "auto", "required", "nonsense", {}, {"type": "function", "function": {"name": "f"}},
                    {"type": "function", "function": {"name": "g"}}, {"type": "any"}, {"type": "tool", "name": "f"}],
    "messages": MESSAGES,
    "input": [CHARACTERS, "", [], *MESSAGES, [{"type": "function_call_output", "call_id": "1", "output": "x"}],
              [{"type": "reasoning", "id": "r", "summary": []}], [{"type": "item_reference", "id": "x"}]],
    "prompt": PROMPTS,
    "prompt_embeds": ["", "AAAA", "x", ["AAAA"], [], "gAJ9cQAu"],
    "tokens": TOKENS,
    "chat_template": TEMPLATES,
    "chat_template_kwargs": [{}, {"enable_thinking": True}, {"messages": 1}, {"x": nest(50)}, {"tokenize": True},
                             {"chat_template": "{{"}, {"continue_final_message": True}, {"truncation": True}],
    "stream_options": [{}, {"include_usage": True}, {"continuous_usage_stats": True}, {"include_usage": 5}],
    "priority": [0, 1, -1, 2**31, 2**63, 2**64],
    "cache_salt": ["x", "", "x" * 1024, "x" * 1025, "\ud800", 5],
    "request_id": ["x", "", "a/b", "\n", "x" * 10000, "\ud800"],
    "vllm_xargs": [{}, {"a": 1}, {"a": "x", "b": [1, "y"]}, {"a": NAN}, {"a": {}}, {"\ud800": 1}],
    "kv_transfer_params": [{}, {"do_remote_prefill": True}, {"do_remote_decode": True}, {"x": nest(50, "a")}],
    "ec_transfer_params": [{}, {"x": 1}],
    "repetition_detection": [
        {}, {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 2}, {"max_pattern_size": 10**9, "min_count": 2},
        {"max_pattern_size": -1}, {"max_pattern_size": 1, "min_pattern_size": 5, "min_count": 3}, {"min_count": 0},
    ],
    "thinking_token_budget": [0, 1, 5, -1, 10**9, 2**63],
    "reasoning_effort": ["none", "low", "max", "nonsense"],
    "stream_interval": [1, 2, 100, 0, 2**63],
    "routed_experts_prompt_start": [0, 1, -1, 10**9],
    "documents": [[], [{"title": "x", "text": "y"}], [{}], [{"x": 5}]],
    "media_io_kwargs": [{}, {"image": {"x": 1}}, {"nonsense": {}}],
    "mm_processor_kwargs": [{}, {"x": 1}],
    "model": ["nonsense", "", None, 5, "\ud800", "x" * 10000],
    "thinking": [{"type": "enabled", "budget_tokens": 16}, {"type": "disabled"}, {"type": "adaptive"}, {"type": "x"}],
    "stop_sequences": [["\n"], [], [""], ["a"] * 1000],
    "system": ["x", "", [{"type": "text", "text": "x"}], [{}], "\ud800"],
    "output_config": [{}, {"format": {"type": "json_schema", "schema": SCHEMAS[0]}}, {"effort": "low"}],
    "text": [{"format": {"type": "text"}}, {"format": {"type": "json_schema", "name": "s", "schema": {"$ref": "#"}}},
        {}],
    "reasoning": [{"effort": "low"}, {"effort": "none"}, {"effort": "x"}, {}],
    "include": [["message.output_text.logprobs"], [], ["x"]],
    "previous_response_id": ["resp_x", "", "x"],
    "background": [True, False],
    "store": [True, False],
    "label_token_ids": [[5, 6], [], [512], [-1], [5], list(range(200))],
    "items": [["x"], [], [[5]], [""], ["x"] * 50],
    "query": ["x", "", [5], [512]],
    "questions": [{}, {"a": {}}, {"a": {"type": "boolean"}}, {"a": {"question": "x", "options": ["y", "n"]}}],
}  # fmt: skip
VALUES["max_completion_tokens"] = VALUES["max_output_tokens"] = VALUES["max_tokens"]
