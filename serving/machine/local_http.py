"""One request to an engine on this machine, by the standard library: it knows no proxies, and blocks."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping

OK = http.client.OK
# What this machine calls itself.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def ask_engine(
    base_url: str,
    path: str,
    body: Mapping[str, object] | None = None,
    *,
    method: str = "GET",
    timeout_s: float,
    api_key: str | None = None,
) -> tuple[int, bytes]:
    """Ask once, on a connection of its own, with a body as JSON; the answer's status and body.

    Raises:
        OSError: there is no answer, or what answers is no HTTP server.
    """
    headers = {} if body is None else {"Content-Type": "application/json"}
    headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    connection = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
