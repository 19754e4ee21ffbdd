"""Whom a request is from: the peer of its connection, or what trusted proxies say about it.

They say so in X-Forwarded-For or Forwarded (RFC 7239). What anybody else says there is not believed, and not passed on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence

from laguna_serve.serving.gateway.wire.headers import Head

# Hops that are looked at, from the nearest on: nobody has as many proxies.
MAX_HOPS = 32
FOR = re.compile(r'(?:^|[;,\s])for="?([^",;]+)"?', re.IGNORECASE)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Proxies:
    """The networks of `server.trusted_proxies`."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks: list[Network] = [ipaddress.ip_network(network) for network in networks]

    def find_client(self, head: Head) -> tuple[str, bytes]:
        """Find the client's address, and the X-Forwarded-For for the engine, which ends in the peer's."""
        if not self._networks or not self._is_trusted(peer := _parse(head.peer)):
            return head.peer, head.peer.encode()
        client, hops = peer, []
        for hop in _list_hops(head):
            address = _parse(hop)
            if address is None:
                break  # unknown, or hidden: nothing before it is believed
            hops.append(str(address))
            client = address
            if not self._is_trusted(address):
                break
        return str(client), ", ".join([*reversed(hops), head.peer]).encode()

    def _is_trusted(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def _list_hops(head: Head) -> Iterator[str]:
    """As they were noted, the nearest first."""
    for name in (b"x-forwarded-for", b"forwarded"):
        text = ",".join(value.decode("latin-1") for found, value in head.headers if found == name)
        if text:
            hops = FOR.findall(text) if name == b"forwarded" else text.split(",")
            yield from list(reversed(hops))[:MAX_HOPS]
            return


def _parse(text: str) -> Address | None:
    """Parse an address, perhaps with a port."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
