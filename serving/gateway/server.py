"""Runs the gateway's application under uvicorn, and ends it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from laguna_serve.serving.engine import EngineError, find_port, require_port
from laguna_serve.serving.gateway.admin import create_admin_app
from laguna_serve.serving.gateway.app import OWN_PATHS, create_app
from laguna_serve.serving.gateway.config import Admin, Config, ConfigError, Server
from laguna_serve.serving.gateway.protocol import make_protocol
from laguna_serve.serving.gateway.relay import Relay

# What a gateway that was told to stop at once may take for it.
STOP_S = 5.0


class GatewayServer(uvicorn.Server):
    """uvicorn's, whose first signal turns new requests away at once and lets those in flight finish. A second one ends
    everything. The admin application runs beside it, on a port of its own."""

    def __init__(
        self,
        settings: uvicorn.Config,
        admin: uvicorn.Config,
        ready: Callable[[], None],
        reload: Callable[[], Config] | None = None,
    ) -> None:
        super().__init__(settings)
        self._admin = _AdminServer(admin)
        self._ready, self._reload = ready, reload

    async def startup(self, sockets: object = None) -> None:
        """Listen, then say so. SIGHUP reads the configuration again."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        self._admin_task = asyncio.create_task(self._admin.serve())
        while not (self._admin.started or self._admin_task.done()):
            await asyncio.sleep(0.01)
        if self._reload is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        # What there is by now stays: the collector need not look at it again while streams wait.
        gc.collect()
        gc.freeze()
        self._ready()

    async def shutdown(self, sockets: object = None) -> None:
        """Finish what is in flight; the admin page shows it to the end."""
        await super().shutdown(sockets)  # type: ignore[arg-type]
        self.relay.close()
        self._admin.should_exit = self._admin.force_exit = True
        await self._admin_task

    @property
    def relay(self) -> Relay:
        """The application's."""
        found: Relay = self.config.app.state.relay  # type: ignore[union-attr]
        return found

    def reload(self) -> None:
        """Take the configuration as it is now; one that is wrong changes nothing. Where to listen stays."""
        assert self._reload is not None
        try:
            config = self._reload()
        except ConfigError as error:
            print(f"laguna: error: {error}; going on as before", file=sys.stderr, flush=True)
            return
        self.relay.configure(config)
        print("gateway: configuration read again", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self.started:
            self.relay.draining = True


class _AdminServer(uvicorn.Server):
    """Stops when the gateway does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the gateway's."""
        yield


def serve(config: Config, announce: Callable[[str, str], None], reload: Callable[[], Config] | None) -> str:
    """Serve until a signal; `announce` is told the URL, and the admin page's, once they answer; `reload` is what SIGHUP
    asks. Returns the URL.

    Raises:
        EngineError: a port is taken.
    """
    config = with_ports(config)
    url = find_url(config.server)
    _make_server(config, lambda: announce(url, find_url(config.admin)), reload).run()
    return url


@contextlib.contextmanager
def in_background(config: Config) -> Iterator[tuple[str, str]]:
    """A gateway in a thread of this process for as long as the block runs; yields its URL and its admin page's. When
    the block ends, streams may finish within `server.drain_s`; a KeyboardInterrupt meanwhile ends them.

    Raises:
        EngineError: a port is taken.
    """
    config = with_ports(config)
    ready = threading.Event()
    server = _make_server(config, ready.set, None)
    thread = threading.Thread(target=server.run, name="gateway", daemon=True)
    thread.start()
    try:
        while not ready.wait(0.1):
            if not thread.is_alive():
                raise EngineError(
                    f"gateway: expected it to listen at {find_url(config.server)}, got an error; see above"
                )
        yield find_url(config.server), find_url(config.admin)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        try:
            thread.join(config.server.drain_s)
        finally:
            server.force_exit = True
            thread.join(STOP_S)
            gc.unfreeze()  # what the rest of this process no longer needs may go again


def with_ports(config: Config) -> Config:
    """The configuration with the ports that are listened on. Raises EngineError when one is taken."""
    server = config.server.model_copy(update={"port": _find_port(config.server)})
    admin = config.admin.model_copy(update={"port": _find_port(config.admin)})
    return config.model_copy(update={"server": server, "admin": admin})


def _find_port(address: Server | Admin) -> int:
    return find_port(address.host) if address.port == 0 else require_port(address.host, address.port)


def find_url(address: Server | Admin) -> str:
    """Where the gateway, or its admin page, answers."""
    scheme = "https" if isinstance(address, Server) and address.ssl_certfile else "http"
    host = address.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address.port}"


def _make_server(config: Config, ready: Callable[[], None], reload: Callable[[], Config] | None) -> GatewayServer:
    app = create_app(config)
    return GatewayServer(make_settings(app, config), make_admin_settings(app, config), ready, reload)


def make_admin_settings(app: FastAPI, config: Config) -> uvicorn.Config:
    """uvicorn's, for the admin application of a gateway."""
    admin = config.admin
    return uvicorn.Config(
        create_admin_app(app.state, admin),
        host=admin.host,
        port=admin.port,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
    )


def make_settings(app: FastAPI, config: Config) -> uvicorn.Config:
    """uvicorn's: nothing logged or answered that the gateway does not mean to."""
    server = config.server
    return uvicorn.Config(
        app,
        host=server.host,
        port=server.port,
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
        http=make_protocol(server.head_timeout_s, server.max_head_bytes, OWN_PATHS, lambda: app.state.relay),
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(server.drain_s),
    )
