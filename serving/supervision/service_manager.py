"""What the service manager is told that has started this process."""

from __future__ import annotations

import contextlib
import os
import socket


def tell_ready() -> None:
    """Tell systemd that it need not wait any more (sd_notify(3), `Type=notify`); nobody, where nobody waits."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.suppress(OSError):
        manager.connect("\0" + address[1:] if address.startswith("@") else address)
        manager.send(b"READY=1")
