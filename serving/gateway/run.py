"""Runs a gateway, in this thread or in one of its own."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.addresses import Listeners, find_url, open_listeners
from laguna_serve.serving.gateway.admin.app import create_admin_app
from laguna_serve.serving.gateway.admin.services import find_services
from laguna_serve.serving.gateway.app import OWN_PATHS, check_files, create_app
from laguna_serve.serving.gateway.clients.admin_http import make_admin_protocol
from laguna_serve.serving.gateway.clients.protocol import make_protocol
from laguna_serve.serving.gateway.clients.startup_check import UnfitServerError, check_protocol, check_uvicorn
from laguna_serve.serving.gateway.config import Config, ConfigError
from laguna_serve.serving.gateway.config.fixed import keep_fixed
from laguna_serve.serving.gateway.counts.board import BoardFullError
from laguna_serve.serving.gateway.server import OWN_STOPS, GatewayServer, WorkerServer
from laguna_serve.serving.gateway.telemetry.event_log import set_up_logging
from laguna_serve.serving.gateway.workers.parent import Workers
from laguna_serve.serving.gateway.workers.team import Team, open_team
from laguna_serve.serving.machine.open_files import raise_limit

# What a gateway that was asked to stop at once may take for it.
STOP_S = 5.0
# And for its files, where a disk is slow.
FILES_S = 10.0


def serve(config: Config, announce: Callable[[str, str], None], reload: Callable[[], Config] | None) -> str:
    """Serve until a signal, and return the URL.

    `announce` gets the URL, and the admin page's, once they answer; `reload` is what SIGHUP asks.

    Raises:
        EngineError: a port is taken, or uvicorn is not one that the gateway runs under.
    """
    set_up_logging()
    raise_limit()
    with open_listeners(config) as listeners:
        url, admin_url = find_url(listeners.config.server), find_url(listeners.config.admin)
        if config.server.workers == 1:
            _make_server(listeners, lambda: announce(url, admin_url), reload, config).run(listeners.server)
        else:
            _serve_by_workers(listeners, lambda: announce(url, admin_url), reload, config)
    return url


def _serve_by_workers(
    listeners: Listeners, announce: Callable[[], None], reload: Callable[[], Config] | None, configured: Config
) -> None:
    """Serve by several processes that are forked from this one."""
    server, latest = configured.server, [listeners.config]
    check_files(configured)  # here, so that what is wrong is said once

    with open_team(server.workers, configured) as team:

        def read() -> Config:
            assert reload is not None
            config = reload()
            try:
                config.check_workers(server.workers)
            except ValueError as error:
                raise ConfigError(f"{error} (at the start)") from None
            try:
                team.check_room(config)
            except BoardFullError as error:
                raise ConfigError(str(error)) from None
            return config

        def keep() -> None:
            latest[0] = keep_fixed(listeners.config, read())

        def work(worker: int, ready: Callable[[], None]) -> bool:
            mine = listeners._replace(config=latest[0], admin=listeners.admin if worker == 0 else [])
            started = _make_server(mine, ready, None if reload is None else read, configured, team)
            started.run(listeners.workers[worker])
            return started.started

        patience_s = server.lame_duck_s + server.shutdown_timeout_s + FILES_S + STOP_S
        Workers(team, work, announce, None if reload is None else keep, OWN_STOPS, patience_s).run()


class Background(NamedTuple):
    """A gateway that runs in a thread: its address, its admin page's, and how to reach into it."""

    url: str
    admin_url: str
    server: GatewayServer


@contextlib.contextmanager
def open_background(config: Config, reload: Callable[[], Config] | None = None) -> Iterator[Background]:
    """Open a gateway in a thread of this process for as long as the block runs; `reload` is what its `reload` asks.

    When the block ends, streams may finish within `server.shutdown_timeout_s`; a KeyboardInterrupt meanwhile ends them.

    Raises:
        EngineError: a port is taken, uvicorn is not one that the gateway runs under, or there are to be more workers.
    """
    if config.server.workers != 1:
        raise EngineError(f"server.workers: expected 1 for a gateway in a thread, got {config.server.workers}")
    set_up_logging()
    raise_limit()
    with open_listeners(config) as listeners, _run_in_thread(listeners, reload) as server:
        yield Background(find_url(listeners.config.server), find_url(listeners.config.admin), server)


@contextlib.contextmanager
def _run_in_thread(listeners: Listeners, reload: Callable[[], Config] | None) -> Iterator[GatewayServer]:
    """Run a gateway from the moment when it is ready until the block ends."""
    # `ended` and not the thread's own end: a join that a signal interrupts takes it for over (Python 3.11).
    ready, ended = threading.Event(), threading.Event()
    server = _make_server(listeners, ready.set, reload)

    def run() -> None:
        try:
            server.run(listeners.server)
        finally:
            ended.set()

    threading.Thread(target=run, name="gateway", daemon=True).start()
    try:
        while not ready.wait(0.1):
            if ended.is_set():
                url = find_url(listeners.config.server)
                raise EngineError(f"gateway: expected it to listen at {url}, got an error; see above")
        yield server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        try:
            ended.wait(listeners.config.server.shutdown_timeout_s)
        finally:
            server.force_exit = True
            ended.wait(STOP_S)
            gc.unfreeze()  # what the rest of this process no longer needs may go again


def _make_server(
    listeners: Listeners,
    ready: Callable[[], None],
    reload: Callable[[], Config] | None,
    configured: Config | None = None,
    team: Team | None = None,
) -> GatewayServer:
    config = listeners.config
    app = create_app(config, team=team)
    settings = make_settings(app, config)
    try:
        check_uvicorn()
        check_protocol(settings)
    except UnfitServerError as error:
        raise EngineError(str(error)) from None
    admin = make_admin_settings(app, config)
    kind = GatewayServer if team is None else WorkerServer
    return kind(app, settings, admin, listeners.admin, ready, reload, configured)


def make_admin_settings(app: FastAPI, config: Config) -> uvicorn.Config:
    """uvicorn's, for the admin application of a gateway."""
    admin = config.admin
    return uvicorn.Config(
        create_admin_app(lambda: find_services(app), admin),
        host=admin.host,
        port=admin.port,
        http=make_admin_protocol(
            config.server.header_timeout_s, config.server.max_head_bytes, lambda: find_services(app).relay
        ),
        ws="none",
        lifespan="off",
        log_config=None,
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
        timeout_keep_alive=math.ceil(server.keepalive_s),
        http=make_protocol(server.header_timeout_s, server.max_head_bytes, OWN_PATHS, lambda: find_services(app).relay),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(server.shutdown_timeout_s),
    )
