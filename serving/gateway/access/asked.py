"""What a request's body asks for, read as the engine reads it: JSON as Python's `json` takes it, and forms."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from laguna_serve.serving.gateway.access.demand import Asked
from laguna_serve.serving.gateway.wire import errors

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MULTIPART, FORM = b"multipart/form-data", b"application/x-www-form-urlencoded"
# Of a form's field. Longer names are nobody's.
MAX_NAME_BYTES = 4096
# And its fields: a body of nothing but their borders would be seconds' work.
MAX_FIELDS = 1000
FIELDS = frozenset(Asked.__struct_fields__) - {"is_json", "plain"}
# What JSON's values are called in OpenAI's errors.
JSON_TYPES = {bool: "a boolean", int: "an integer", float: "a decimal", list: "an array", dict: "an object"}


class UnreadableError(ValueError):
    """The body is not in its form, or `model` is no string; the message is for the client."""


def read_asked(body: bytes, content_type: bytes) -> Asked:
    """Read the model's name, None where the body has none or an empty one, and what else the gateway reads of JSON.

    Raises:
        UnreadableError: the body is not what it should be, or its name is no string.
        GatewayError: 400 its JSON is nested too deeply for Python's parser, and so for the engine's.
    """
    if not body:
        return Asked()
    kind = content_type.lower()
    if kind.startswith(MULTIPART):
        return Asked(_read_multipart(body, parse_options_header(content_type)[1].get(b"boundary", b"")) or None)
    try:
        asked = msgspec.json.decode(body, type=Asked)
        asked.model, asked.is_json, asked.plain = asked.model or None, True, True
        return asked
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # Python's parser takes more: a BOM, NaN, lone surrogates, UTF-16, a name of any type before the last one
    except RecursionError:
        raise _too_deep() from None
    try:
        return _read_json(body)
    except UnreadableError:
        if kind.startswith(FORM) and (name := _read_form(body)) is not None:
            return Asked(name or None)
        raise


def _read_json(body: bytes) -> Asked:
    try:
        found = json.loads(body)
    except ValueError:  # UnicodeDecodeError is one
        raise UnreadableError("We could not parse the JSON body of your request.") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        return Asked()
    name = found.get("model")
    if name is None or isinstance(name, str):
        known = {field: found[field] for field in FIELDS & found.keys()}
        return Asked(**(known | {"model": name or None, "is_json": True}))
    kind = JSON_TYPES[type(name)]
    raise UnreadableError(f"Invalid type for 'model': expected a string, but got {kind} instead.")


def _read_form(body: bytes) -> str | None:
    """Read it of a form; None where it has none, or more fields than anybody's."""
    try:
        fields = parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="utf-8", max_num_fields=MAX_FIELDS)
    except ValueError:
        return None
    return dict(fields).get("model")


def _too_deep() -> errors.GatewayError:
    return errors.bad_request("We could not parse the JSON body of your request: it is nested too deeply.")


def _read_multipart(body: bytes, boundary: bytes) -> str | None:
    fields = _ModelField()
    try:
        parser = MultipartParser(boundary, fields.callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise UnreadableError("We could not parse the multipart form data of your request.") from None
    return fields.value


class _ModelField:
    """Collects the field `model` of a form, the last one where there are several; files are passed over."""

    def __init__(self) -> None:
        self.value: str | None = None
        self._parts = 0
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_name,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_head,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
        }
        self._begin()

    def _begin_part(self) -> None:
        """Begin a part. Raises FormParserError: they are more than anybody's, each of which takes its time."""
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise FormParserError
        self._begin()

    def _begin(self) -> None:
        self._name, self._header, self._disposition, self._data = b"", b"", b"", bytearray()
        self._wanted = False

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._header
        self._name = self._header = b""

    def _end_head(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._wanted = options.get(b"name") == b"model" and b"filename" not in options

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted and len(self._data) <= MAX_NAME_BYTES:
            self._data += data[start:end]

    def _end(self) -> None:
        if self._wanted:
            self.value = self._data[: MAX_NAME_BYTES + 1].decode("utf-8", "replace")
