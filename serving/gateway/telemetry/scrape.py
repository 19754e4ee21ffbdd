"""Reads an engine's metrics."""

from __future__ import annotations

import aiohttp

from laguna_serve.serving.gateway.config.tables import Endpoint

TIMEOUT_S = 2.0


async def read_metrics(session: aiohttp.ClientSession, endpoint: Endpoint) -> str:
    """The text that an engine shows, or nothing."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with session.get(f"{endpoint.url}/metrics", timeout=timeout, **endpoint.request_options()) as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError):
        return ""
