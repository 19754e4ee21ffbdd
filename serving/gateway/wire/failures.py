"""How a connection to an engine fails, and what an engine's error says."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import ssl

# This machine has run out of something: no fault of the engine's.
LOCAL_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class UnreachableError(ConnectionError):
    """No connection could be made: nothing was sent.

    `refused`: nobody listens; `silent`: nobody answered in time; `shortage`: this machine has no file descriptor or
    memory left for it.
    """

    def __init__(self, error: OSError, timeout_s: float) -> None:
        # Several addresses of a name: asyncio puts their errors into one text.
        codes = {int(code) for code in re.findall(r"\[Errno (\d+)\]", str(error))} | {error.errno}
        self.silent = isinstance(error, TimeoutError)
        self.refused = errno.ECONNREFUSED in codes
        self.shortage = bool(codes & LOCAL_SHORTAGE)
        if self.silent:
            reason = f"no connection within {timeout_s:g} s"
        elif isinstance(error, ssl.SSLCertVerificationError):
            reason = f"certificate: {error.verify_message}"
        else:
            reason = "connection refused" if self.refused else error.strerror or type(error).__name__
        super().__init__(reason)


class BrokenError(ConnectionError):
    """The connection ended, or what came was no HTTP, before the answer was complete."""


class StaleError(BrokenError):
    """The engine had closed the kept connection before the whole request reached it, so that it was not processed."""


class SilentError(TimeoutError):
    """Nothing came for too long."""


class StalledError(TimeoutError):
    """What came was not taken for too long."""


def find_message(body: str) -> str:
    """Find what an engine's error says: its message where it is in OpenAI's form, else the body as it is."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        body = str(json.loads(body)["error"]["message"])
    return body[:500]
