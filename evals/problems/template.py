"""What a chat template gets beside the messages: fields such as enable_thinking."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from laguna_serve.serving.kit.flags import Flag
from laguna_serve.serving.kit.results import JsonObject

Template = Mapping[str, Any]


def parse_fields(text: str) -> Template:
    """Parse a JSON object of fields; raises ArgumentTypeError."""
    try:
        fields = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"expected a JSON object, got {error}; fix it") from None
    if not isinstance(fields, dict):
        raise ArgumentTypeError(f"expected a JSON object, got {type(fields).__name__}; fix it")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


# The two fields of a configuration that say it.
Thinking = Annotated[
    Literal["on", "off"] | None, Flag("enable_thinking of the chat template (default: the template's own)")
]
TemplateFields = Annotated[
    Template | None, Flag("other fields for the chat template, as a JSON object", metavar="JSON", parse=parse_fields)
]


def make_template(thinking: Literal["on", "off"] | None, fields: Template | None) -> JsonObject:
    """Make the template's fields, of which `thinking` sets enable_thinking."""
    return {**(fields or {}), **({} if thinking is None else {"enable_thinking": thinking == "on"})}
