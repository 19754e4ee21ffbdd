"""Answers that point at the engine point at the gateway instead.

An engine makes absolute URLs of the Host that it was asked under, which is its own: clients would leave the gateway,
its keys and its limits. References elsewhere pass as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

POINTING = frozenset((b"location", b"content-location", b"link"))
TARGETS = re.compile(rb"<([^<>]*)>")
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True, frozen=True)
class Site:
    """Where an engine is: `authority` as in Host, `host` in lower case, and the path under which it serves, if any."""

    authority: bytes
    host: str
    port: int
    prefix: bytes = b""


def localize(name: bytes, value: bytes, site: Site) -> bytes:
    """Translate a header's value, one of POINTING, for clients of the gateway."""
    if name == b"link":
        return TARGETS.sub(lambda found: b"<" + localize_url(found[1], site) + b">", value)
    return localize_url(value, site)


def localize_url(url: bytes, site: Site) -> bytes:
    """Turn a URL of the engine into a path on the gateway; any other stays as it is."""
    text = url.strip().decode("latin-1")
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, site.port)
    except ValueError:
        return url
    if parts.netloc:
        if parts.scheme not in ("", "http", "https") or (parts.hostname, port) != (site.host, site.port):
            return url
    elif parts.scheme or not (site.prefix and text.startswith("/")):
        return url  # it is relative, and leads where the client asked
    path = parts.path
    prefix = site.prefix.decode("latin-1")
    if path == prefix or path.startswith(prefix + "/"):
        path = path[len(prefix) :]
    # With more than one slash it would be another host's name.
    path = "/" + path.lstrip("/\\")
    return urlunsplit(("", "", path, parts.query, parts.fragment)).encode("latin-1")
