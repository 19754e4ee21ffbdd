"""Runs the gateway's application under uvicorn, and ends it in good order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from laguna_serve.serving.engine import find_port, require_port
from laguna_serve.serving.gateway.app import create_app
from laguna_serve.serving.gateway.config import Config, ConfigError


class GatewayServer(uvicorn.Server):
    """uvicorn's, whose first signal turns new requests away at once and lets those in flight finish. A second one ends
    everything."""

    def __init__(
        self, settings: uvicorn.Config, ready: Callable[[], None], reload: Callable[[], Config] | None = None
    ) -> None:
        super().__init__(settings)
        self._ready, self._reload = ready, reload

    async def startup(self, sockets: object = None) -> None:
        """Listen, then say so. SIGHUP reads the configuration again."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        if self._reload is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        self._ready()

    def reload(self) -> None:
        """Take the configuration as it is now; one that is wrong changes nothing. Where to listen stays."""
        assert self._reload is not None
        try:
            config = self._reload()
        except ConfigError as error:
            print(f"laguna: error: {error}; going on as before", file=sys.stderr, flush=True)
            return
        self.config.app.state.relay.configure(config)  # type: ignore[union-attr]
        print("gateway: configuration read again", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        relay = getattr(self.config.app.state, "relay", None)  # type: ignore[union-attr]
        if relay is not None:
            relay.draining = True


def serve(config: Config, announce: Callable[[str], None], reload: Callable[[], Config] | None) -> str:
    """Serve until a signal; `announce` is told the URL once it answers, `reload` is what SIGHUP asks. Returns the URL.

    Raises:
        EngineError: the port is taken.
    """
    host = config.server.host
    port = find_port(host) if config.server.port == 0 else require_port(host, config.server.port)
    url = f"http://{host}:{port}"
    settings = uvicorn.Config(
        create_app(config),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=round(config.server.drain_s),
    )
    GatewayServer(settings, lambda: announce(url), reload).run()
    return url
