"""What a gateway consists of once its application has started: all that the admin port looks into."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from fastapi import FastAPI

from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.workers.peers import Peers


@dataclass(frozen=True, slots=True)
class Services:
    """What a gateway's applications share: the relay, and the sessions for its own requests.

    `session` is for scrapes and shadows; `steps` keeps no connection, for health checks and updates of weights: vLLM
    closes one after an error without saying so. `peers` are the other processes of this gateway, where there are any.
    """

    relay: Relay
    session: aiohttp.ClientSession
    steps: aiohttp.ClientSession
    peers: Peers | None = None


def find_services(app: FastAPI) -> Services:
    """Those of a gateway's application. Raises AttributeError: it has not started."""
    services: Services = app.state.services
    return services
