"""A byte-level BPE tokenizer with a chat template, trained on the toy corpus."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from laguna_serve.scripts.text.corpus import Module

VOCAB_SIZE = 512
PAD, BOS, EOS, MASK, END, ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT = range(8)
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<|end|>", "<system>", "<user>", "<assistant>"]
# Bytes that UTF-8 never holds, so that no text needs their ids, as ByteLevel writes them. The ids are the marks of
# thinking and tool calls instead: tokens, as parsers look them up in the vocabulary, but not special ones, as in the
# releases: they are part of a completion's text.
UNUSED_BYTES = "ÀÁõö÷øùúûüýþ"  # C0 C1 F5 … FE
MARKS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<tool_response>", "</tool_response>", "<available_tools>", "</available_tools>"),
]

# In the form of Laguna's: the tools in the system part, calls in <tool_call> with <arg_key> and <arg_value>, thoughts
# in <think>, which enable_thinking opens; generation markers, so that trainers can mask the loss. What differs: every
# turn ends with <|end|>, and a request that does not say whether to think gets neither <think> nor </think>, as the
# chats that the toy was trained on have none.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- macro turn(role, text) -%}{{- '<' ~ role ~ '>\\n' ~ text ~ '<|end|>\\n' -}}{%- endmacro -%}
{%- set ns = namespace(first=0) -%}
{%- if tools -%}
  {%- set ns.text = '' -%}
  {%- if messages and messages[0].role == 'system' -%}
    {%- set ns.first = 1 -%}
    {%- set ns.text = messages[0].content ~ '\\n\\n' -%}
  {%- endif -%}
  {%- set ns.text = ns.text ~ '### Tools\\n\\nYou may call these functions:\\n<available_tools>\\n' -%}
  {%- for tool in tools -%}{%- set ns.text = ns.text ~ (tool | tojson) ~ '\\n' -%}{%- endfor -%}
  {{- turn('system', ns.text ~ '</available_tools>') -}}
{%- endif -%}
{%- for message in messages[ns.first:] -%}
  {%- set content = message.content if message.content is string else '' -%}
  {%- if message.role == 'system' -%}
    {{- turn('system', content) -}}
  {%- elif message.role == 'user' -%}
    {{- turn('user', content) -}}
  {%- elif message.role == 'tool' -%}
    {{- '<tool_response>\\n' ~ content ~ '\\n</tool_response>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<assistant>\\n' -}}
    {%- generation -%}
    {%- set thoughts = message.reasoning or message.reasoning_content -%}
    {%- if thoughts is string and thoughts -%}
      {{- '<think>' ~ thoughts ~ '</think>' -}}
    {%- elif enable_thinking is defined -%}
      {{- '</think>' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<tool_call>' ~ call.function.name ~ '\\n' -}}
      {%- for name, value in call.function.arguments.items() -%}
        {{- '<arg_key>' ~ name ~ '</arg_key>\\n<arg_value>' -}}
        {{- value if value is string else value | tojson(ensure_ascii=False) -}}
        {{- '</arg_value>\\n' -}}
      {%- endfor -%}
      {{- '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|end|>' -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- raise_exception('role: expected system, user, assistant or tool, got ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<assistant>\\n' -}}
  {%- if enable_thinking is defined -%}{{- '<think>' if enable_thinking else '</think>' -}}{%- endif -%}
{%- endif -%}
"""


def train_tokenizer(modules: list[Module], size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train on the given modules; `size` ids, the special ones first in the order of `SPECIAL`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m.text for m in modules), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=name_marks(tokenizer),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        mask_token="<mask>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def name_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Put `MARKS` in the place of `UNUSED_BYTES` in the tokenizer; every text without a mark keeps its ids."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    for byte, mark in zip(UNUSED_BYTES, MARKS, strict=True):
        if any(byte in part for merge in model["merges"] for part in merge):
            raise ValueError(f"byte {byte!r}: expected one that no merge holds; the corpus is not UTF-8")
        number = model["vocab"].pop(byte)
        model["vocab"][mark] = number
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        state["added_tokens"].append({"id": number, "content": mark, **flags})
    state["added_tokens"].sort(key=lambda token: token["id"])
    model["vocab"] = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return Tokenizer.from_str(json.dumps(state))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read back what `save_pretrained` wrote."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
