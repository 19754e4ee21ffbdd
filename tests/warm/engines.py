"""Engines of this process start warm: their supervisor and their API server are forked, and import nothing again."""

from __future__ import annotations

import subprocess
from typing import Any

from laguna_serve.serving.engine import engine
from laguna_serve.serving.planning.command import SERVER_MODULE
from warm.client import warm

SUPERVISOR = "laguna_serve.serving.supervision.reaper"


class _Subprocess:
    """`subprocess` for serving/engine/engine.py."""

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    @staticmethod
    def Popen(command: list[str], *, env: dict[str, str], **named: Any) -> Any:  # noqa: N802
        """The supervisor of a vLLM is forked with all that follows it; any other command is started as it is."""
        if SUPERVISOR not in command or SERVER_MODULE not in command:
            return subprocess.Popen(command, env=env, **named)
        own = command[command.index(SUPERVISOR) + 2 :]  # without the parent's id: it is another one here
        return warm().start("supervisor:supervise", *own, environment=env)  # which server.py has imported


def start_engines_warm(yes: bool) -> None:
    """From now on, or no more."""
    engine.subprocess = _Subprocess if yes else subprocess  # type: ignore[attr-defined]
