"""What the gateway changes in a request for a key: its priority, and that a stream is asked for its usage.

A body stays the bytes that it was but for one field that is put in front. Where it has that field already, its others
keep their bytes, which may be millions; JSON that not everybody reads is written anew.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import UNSET

from laguna_serve.serving.gateway.access.demand import Asked

# Whose streams tell their usage only if they are asked; the others' last events have it.
ASKING = frozenset(("/v1/chat/completions", "/v1/completions"))
# Whose requests have vLLM's field `priority` (Anthropic's have none).
PRIORITIES = ASKING | {"/v1/responses", "/v1/embeddings", "/pooling", "/classify", "/score", "/rerank"}
ENDS = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)|(?<=\r\r)")
ASK = b'"stream_options":{"include_usage":true},'
EMPTY = re.compile(rb"\s*\}")
USAGE = b'"usage"'
# So ends an event whose last field are its choices. Whatever has usage and no choice ends otherwise.
CHOICES_END = b"}]}\n\n"
# A larger number of a request is this one: vLLM takes no more than 64 bits.
MOST_PRIORITY = 1 << 31


def ask_usage(path: str, body: bytes, asked: Asked) -> bytes | None:
    """Ask for a stream's usage where the client has not; None where there is nothing to change."""
    if asked.stream is not True or not asked.plain or path not in ASKING:
        return None
    options = asked.stream_options
    if options is UNSET:  # as most are
        begin = body.index(b"{") + 1
        return b"".join((body[:begin], ASK, body[begin:]))
    if options is None:
        return put(body, asked, "stream_options", {"include_usage": True})
    if not isinstance(options, dict) or options.get("include_usage") not in (None, False):
        return None
    # Without usage, vLLM ignores that every event should have it.
    options = {**options, "include_usage": True, "continuous_usage_stats": False}
    return put(body, asked, "stream_options", options)


def set_priority(path: str, body: bytes, asked: Asked, priority: int) -> bytes:
    """Put the priority into a request that may have one, unless it says the same."""
    given = 0 if asked.priority is UNSET else asked.priority
    if not asked.is_json or path not in PRIORITIES or given == priority:
        return body
    return put(body, asked, "priority", priority)


def find_priority(asked: Asked, own: int) -> int:
    """Find a request's priority: its key's `own`, which it may lower (a larger number) and not raise."""
    return max(own, min(asked.priority, MOST_PRIORITY)) if type(asked.priority) is int else own


def put(body: bytes, asked: Asked, name: str, value: Any) -> bytes:
    """Put a field of a JSON object in the place of the one that is there, or in front of the others."""
    is_there = name == "model" or getattr(asked, name, UNSET) is not UNSET
    if not asked.plain:
        return json.dumps({**json.loads(body), name: value}).encode()
    if is_there:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw]) | {name: json.dumps(value).encode()}
        return b"{%b}" % b", ".join(b"%b: %b" % (json.dumps(key).encode(), part) for key, part in fields.items())
    begin = body.index(b"{") + 1
    rendered = b"%d" % value if type(value) is int else msgspec.json.encode(value)
    comma = b"" if asked.model is None and EMPTY.match(body, begin) else b","
    return b"".join((body[:begin], b'"', name.encode(), b'":', rendered, comma, body[begin:]))


def drop_usage(events: bytes) -> bytes:
    """Drop the usage that was asked for in the client's place; `events` are whole, as `EventStream` hands them on.

    Without USAGE in them there is none.
    """
    if events.find(b"\n\n") == len(events) - 2 and b"\r" not in events:  # one, as most come
        return b"" if is_usage(events) else events
    return b"".join(event for event in ENDS.split(events) if not is_usage(event))


def is_usage(event: bytes) -> bool:
    """Whether an event has nothing but the usage of its stream: no choice."""
    if not event.startswith(b"data:"):
        return False
    try:
        found = msgspec.json.decode(event[5:])
    except (msgspec.DecodeError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("choices") == [] and isinstance(found.get("usage"), dict)
