"""Engines of this process, and what is asked of vLLM before one starts, are warm: forked, they import nothing again."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from laguna_serve.serving.engine import engine, row_check
from laguna_serve.serving.planning import vllm_flags
from laguna_serve.serving.planning.command import SERVER_MODULE
from warm.client import run_warm, warm

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


class _Programs:
    """`subprocess` for what runs a program of Python's to its end."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    @staticmethod
    def run(
        command: list[str],
        *,
        input: str,
        timeout: float,
        env: dict[str, str] | None = None,
        stderr: Any = None,
        **_named: Any,
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        assert command[1] in ("-c", "-m")
        done = run_warm(command[2], *command[3:], environment=env, timeout=timeout, text=input)
        if stderr is not None:
            stderr.write(done.stderr)
        return done


def start_engines_warm(yes: bool) -> None:
    """From now on, or no more."""
    engine.subprocess = _Subprocess if yes else subprocess  # type: ignore[attr-defined]
    for module in (row_check, vllm_flags):
        module.subprocess = _Programs if yes else subprocess  # type: ignore[attr-defined]
