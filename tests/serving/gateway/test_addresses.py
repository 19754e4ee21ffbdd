"""Where the gateway listens: a port is its own from the moment it is found; a name's addresses share one."""

from __future__ import annotations

import re
import socket

import pytest

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.addresses import check_addresses, find_url, open_listeners
from laguna_serve.serving.gateway.config import Config, parse_config

MODELS = [{"name": "m", "upstreams": [{"name": "a", "url": "http://127.0.0.1:9"}]}]


def configure(**server: str | int) -> Config:
    return parse_config({"models": MODELS, "server": {"port": 0, **server}}, "test")


def test_free_port_is_held_from_when_it_is_found() -> None:
    with open_listeners(configure()) as listeners:
        for address in (listeners.config.server, listeners.config.admin):
            assert address.port != 0
            with pytest.raises(EngineError, match=f"port: expected 127.0.0.1:{address.port} to be free, got Address"):
                open_listeners(configure(port=address.port)).__enter__()
            socket.create_connection(("127.0.0.1", address.port), 5).close()  # it waits in the queue
    with socket.socket() as free:
        free.bind(("127.0.0.1", listeners.config.server.port))


def test_refusal_lets_go_of_what_was_held() -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        tables = {"server": {"port": port}, "admin": {"port": taken.getsockname()[1]}}
        with pytest.raises(EngineError, match="to be free, got Address already in use; choose another port"):
            open_listeners(parse_config({"models": MODELS, **tables}, "test")).__enter__()
    with open_listeners(configure(port=port)) as listeners:
        assert listeners.config.server.port == port


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 300, "a..b", "[::1]"])
def test_unknown_host_is_named(host: str) -> None:
    message = f"host: expected an address or a known name, got {re.escape(host)}: "
    with pytest.raises(EngineError, match=message):
        open_listeners(configure(host=host)).__enter__()
    with pytest.raises(EngineError, match=message):
        check_addresses(configure(host=host))


def test_addresses_of_a_name_share_one_port() -> None:
    with open_listeners(configure(host="localhost")) as listeners:
        ports = {listener.getsockname()[1] for listener in listeners.server}
        families = [listener.family for listener in listeners.server]
        assert len(ports) == 1
        assert socket.AF_INET in families
        assert len(set(families)) == len(families)
        assert find_url(listeners.config.server) == f"http://localhost:{ports.pop()}"


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_address_of_version_6_is_bracketed() -> None:
    try:
        with open_listeners(configure(host="::1")) as listeners:
            assert find_url(listeners.config.server) == f"http://[::1]:{listeners.config.server.port}"
            socket.create_connection(("::1", listeners.config.server.port), 5).close()
    except EngineError as error:
        pytest.skip(str(error))
