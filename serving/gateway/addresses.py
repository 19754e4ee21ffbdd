"""Where the gateway and its admin page listen."""

from __future__ import annotations

import errno
import socket

from laguna_serve.serving.engine import EngineError, find_port, require_port
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.config.tables import Admin, Server


def with_ports(config: Config) -> Config:
    """Return the configuration with the ports that are listened on. Raises EngineError when one is taken."""
    server = config.server.model_copy(update={"port": _find_port(config.server)})
    admin = config.admin.model_copy(update={"port": _find_port(config.admin)})
    return config.model_copy(update={"server": server, "admin": admin})


def check_addresses(config: Config) -> None:
    """Every address to listen on is one of this machine's, with a port that this user may have.

    It may be in use: by the gateway whose configuration is checked. Raises EngineError.
    """
    for address in (config.server, config.admin):
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((address.host, address.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    where = f"{address.host}:{address.port}"
                    got = error.strerror or error
                    raise EngineError(f"port: expected to listen at {where}, got {got}; choose another") from None


def _find_port(address: Server | Admin) -> int:
    return find_port(address.host) if address.port == 0 else require_port(address.host, address.port)


def find_url(address: Server | Admin) -> str:
    """Where the gateway, or its admin page, answers."""
    scheme = "https" if isinstance(address, Server) and address.ssl_certfile else "http"
    host = address.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address.port}"
