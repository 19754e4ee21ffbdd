"""Inside the jail: runs the program under test and serves calls of its function. It knows no test."""

from __future__ import annotations

import sys
import traceback
import types
from typing import Any

from laguna_serve.evals.sandbox_wire import TEXT_CHARS, Peer, PeerGone

NAME = "solution"


def play(config: dict[str, Any], wire_fd: int) -> None:
    """Run config["program"], say whether it defines config["entry_point"], and serve until the judge is through."""
    peer = Peer(wire_fd, config["message_bytes"])
    # Known by its name, as dataclasses and type hints look it up; not "__main__", or its own demonstration would run.
    module = sys.modules[NAME] = types.ModuleType(NAME)
    try:
        exec(compile(config["program"], NAME + ".py", "exec"), module.__dict__)
        function = vars(module).get(config["entry_point"])
        if not callable(function):
            raise NameError(f"expected a function {config['entry_point']}, got none")
    except BaseException as error:
        peer.say("broken", describe(error))
        return
    peer.export(function)
    peer.say("ready", "")
    try:
        peer.serve()
    except PeerGone:
        return


def describe(error: BaseException) -> str:
    """The exception in one line, with the program's line where it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == NAME + ".py"]
    where = f" (line {lines[-1]})" if lines else ""
    try:
        return f"{type(error).__name__}: {error}{where}"[:TEXT_CHARS]
    except Exception:
        return type(error).__name__
