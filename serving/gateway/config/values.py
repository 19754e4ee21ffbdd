"""The types of a configuration's values, each with its own words for what it must be.

Messages have no value: it is added where it may be shown (faults.py).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from laguna_serve.serving.gateway.config import endpoint

HOW_TO_DIGEST = 'printf %s "$KEY" | sha256sum'
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+|null|\*")
MAX_SCHEDULE_BYTES = 64 << 20
# Characters that a terminal obeys, or that end a line: of names that stand in lines of logs and metrics.
CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", name):
        raise ValueError("expected at most 128 letters, digits and . _ / -, the first a letter or a digit")
    return name


def _check_model_name(name: str) -> str:
    if not re.fullmatch(rf"[^{CONTROLS}]{{1,512}}", name):
        raise ValueError("expected 1 to 512 characters, none of them a control character or the end of a line")
    return name


def _check_digest(digest: str) -> str:
    """Check a SHA-256, in either case of its letters.

    The messages never have it: a key may have been put here in plain.
    """
    expected = "expected the SHA-256 of a key, 64 hexadecimal digits"
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
        raise ValueError(f"{expected}, got something else (not shown); make it with: {HOW_TO_DIGEST}")
    if digest.lower() == hashlib.sha256(b"").hexdigest():
        raise ValueError(f"{expected}, got that of no characters at all; set KEY, then: {HOW_TO_DIGEST}")
    return digest.lower()


def _check_path(path: str) -> str:
    if not re.fullmatch(r"/[\x21\x22\x24-\x3e\x40-\x7e]*", path):
        raise ValueError("expected a path that begins with /, without spaces, ? and #")
    return path


def _check_origin(origin: str) -> str:
    if not ORIGIN.fullmatch(origin.lower()):
        raise ValueError('expected an origin such as "https://chat.example.org" (no path, no slash at the end) or "*"')
    return origin.lower()


def _check_host(host: str) -> str:
    if not re.fullmatch(rf"[^\s{CONTROLS}]{{1,1024}}", host):
        raise ValueError("expected an address or a name, without spaces")
    return host


def _check_file_name(path: str) -> str:
    if not re.fullmatch(rf"[^{CONTROLS}]+", path) or any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError("expected a file's name, without control characters and with parts of at most 255 bytes")
    return path


def _check_network(network: str) -> str:
    try:
        return str(ipaddress.ip_network(network))
    except ValueError:
        raise ValueError('expected an address or a network such as "10.0.0.0/8"') from None


def read_schedule(value: Any) -> Any:
    """Read a schedule, or the sweep.json that has it."""
    if not isinstance(value, str):
        return value
    try:
        text = endpoint.read_file(value, "gamma_schedule", MAX_SCHEDULE_BYTES)
        return json.loads(text)["schedule"]["num_speculative_tokens_per_batch_size"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "JSON without it"
        raise ValueError(f"expected a schedule or a sweep.json, got {value!r}: {reason}") from None


Name = Annotated[str, AfterValidator(_check_name)]
ModelName = Annotated[str, AfterValidator(_check_model_name)]
Url = Annotated[str, AfterValidator(endpoint.check_url)]
Digest = Annotated[str, AfterValidator(_check_digest)]
UrlPath = Annotated[str, AfterValidator(_check_path)]
Origin = Annotated[str, AfterValidator(_check_origin)]
Host = Annotated[str, AfterValidator(_check_host)]
FileName = Annotated[str, AfterValidator(_check_file_name)]
Network = Annotated[str, AfterValidator(_check_network)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Range = tuple[int, int, Annotated[int, Field(ge=0)]]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
TokenCount = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Schedule = Annotated[
    tuple[Annotated[Range, Field(strict=False)], ...], BeforeValidator(read_schedule), Field(strict=False)
]
