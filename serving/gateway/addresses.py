"""Where the gateway and its admin page listen."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.config.listening import Admin, Server

# Connections that wait to be accepted, as uvicorn has it.
BACKLOG = 2048


class Listeners(NamedTuple):
    """Sockets that listen, and the configuration with the ports that they have; `workers` are those of each process."""

    config: Config
    workers: list[list[socket.socket]]
    admin: list[socket.socket]

    @property
    def server(self) -> list[socket.socket]:
        """Those of the only process, or the first."""
        return self.workers[0]


@contextlib.contextmanager
def open_listeners(config: Config) -> Iterator[Listeners]:
    """Listen for as long as the block runs: a port that was found free is nobody else's from then on.

    Raises:
        EngineError: a port is taken, or an address is none of this machine's.
    """
    with contextlib.ExitStack() as stack:
        server = _listen(stack, config.server)
        workers = [server, *(_listen_beside(stack, server) for _ in range(config.server.workers - 1))]
        admin = _listen(stack, config.admin)
        tables = {
            "server": config.server.model_copy(update={"port": server[0].getsockname()[1]}),
            "admin": config.admin.model_copy(update={"port": admin[0].getsockname()[1]}),
        }
        yield Listeners(config.model_copy(update=tables), workers, admin)


def check_addresses(config: Config) -> None:
    """Every address to listen on is one of this machine's, with a port that this user may have.

    It may be in use: by the gateway whose configuration is checked. Raises EngineError.
    """
    for address in (config.server, config.admin):
        for family, kind, _, _, place in _resolve(address):
            with socket.socket(family, kind) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    server.bind(place)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        where = f"{address.host}:{address.port}"
                        got = error.strerror or error
                        raise EngineError(f"port: expected to listen at {where}, got {got}; choose another") from None


def _resolve(address: Server | Admin) -> list[Any]:
    """Resolve a host's name to its addresses, each once. Raises EngineError."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # the latter of labels that are none
        got = f"{address.host}: {error.strerror if isinstance(error, socket.gaierror) else 'no name of a host'}"
        raise EngineError(f"host: expected an address or a known name, got {got}") from None
    return list(dict.fromkeys(found))


def _listen(stack: contextlib.ExitStack, address: Server | Admin) -> list[socket.socket]:
    """Listen at every address of a host's name, all with one port."""
    port, sockets = address.port, []
    try:
        for family, kind, _, _, place in _resolve(address):
            listener = stack.enter_context(socket.socket(family, kind))
            # As uvicorn does: connections of an earlier server that still linger do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((place[0], port, *place[2:]))
            listener.listen(BACKLOG)
            port = listener.getsockname()[1]
            sockets.append(listener)
    except OSError as error:
        remedy = "choose another port or stop what listens there"
        got = error.strerror or error
        raise EngineError(f"port: expected {address.host}:{port} to be free, got {got}; {remedy}") from None
    return sockets


def _listen_beside(stack: contextlib.ExitStack, first: list[socket.socket]) -> list[socket.socket]:
    """Listen where others do already: the kernel spreads connections over all of them.

    They are marked only now, so that whoever else listens there was found before.
    """
    sockets = []
    for other in first:
        listener = stack.enter_context(socket.socket(other.family, other.type))
        for marked in (other, listener):
            marked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if other.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(other.getsockname())
        listener.listen(BACKLOG)
        sockets.append(listener)
    return sockets


def find_url(address: Server | Admin) -> str:
    """Where the gateway, or its admin page, answers."""
    scheme = "https" if isinstance(address, Server) and address.ssl_certfile else "http"
    host = address.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address.port}"
