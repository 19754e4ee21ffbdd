"""A server of vLLM (api_server.py) that is imported before it is known what it serves.

    python -m laguna_serve.plugins.processes.spare    then, on stdin, a line: the server's arguments, a JSON list

It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import sys

from laguna_serve.plugins.processes import api_server


def run() -> None:
    """Import vLLM's server, wait for its arguments, and execute it."""
    api_server.load()
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.argv[1:] = json.loads(line)
    api_server.execute()


if __name__ == "__main__":
    run()
