"""Runs the gateway's application under uvicorn, and ends it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from laguna_serve.serving.engine import EngineError, find_port, require_port
from laguna_serve.serving.gateway.app import create_app
from laguna_serve.serving.gateway.config import Config, ConfigError
from laguna_serve.serving.gateway.protocol import bound

# What a gateway that was told to stop at once may take for it.
STOP_S = 5.0


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
    config = with_port(config)
    url = find_url(config)
    _make_server(config, lambda: announce(url), reload).run()
    return url


@contextlib.contextmanager
def in_background(config: Config) -> Iterator[str]:
    """A gateway in a thread of this process for as long as the block runs; yields its URL. When the block ends, streams
    may finish within `server.drain_s`; a KeyboardInterrupt meanwhile ends them.

    Raises:
        EngineError: the port is taken.
    """
    config = with_port(config)
    ready = threading.Event()
    server = _make_server(config, ready.set, None)
    thread = threading.Thread(target=server.run, name="gateway", daemon=True)
    thread.start()
    try:
        while not ready.wait(0.1):
            if not thread.is_alive():
                raise EngineError(f"gateway: expected it to listen at {find_url(config)}, got an error; see above")
        yield find_url(config)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        try:
            thread.join(config.server.drain_s)
        finally:
            server.force_exit = True
            thread.join(STOP_S)


def with_port(config: Config) -> Config:
    """The configuration with the port that is listened on. Raises EngineError when it is taken."""
    host, port = config.server.host, config.server.port
    found = find_port(host) if port == 0 else require_port(host, port)
    return config.model_copy(update={"server": config.server.model_copy(update={"port": found})})


def find_url(config: Config) -> str:
    """Where the gateway answers."""
    host = config.server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def _make_server(config: Config, ready: Callable[[], None], reload: Callable[[], Config] | None) -> GatewayServer:
    return GatewayServer(make_settings(create_app(config), config), ready, reload)


def make_settings(app: FastAPI, config: Config) -> uvicorn.Config:
    """uvicorn's: nothing logged or answered that the gateway does not mean to."""
    return uvicorn.Config(
        app,
        host=config.server.host,
        port=config.server.port,
        http=bound(config.server.head_timeout_s, config.server.max_head_bytes),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=round(config.server.drain_s),
    )
