"""Engines of this process, and what is asked of vLLM before one starts, are warm: forked, they import nothing again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

from laguna_serve.serving.engine import engine, row_check
from laguna_serve.serving.planning import vllm_flags
from laguna_serve.serving.planning.command import SERVER_MODULE
from warm.client import WarmProcess, run_warm, warm

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


class WarmPrograms:
    """`subprocess` for what runs programs of Python's to their end; the engines of a file are warm, too."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    @staticmethod
    def run(
        command: list[str],
        *,
        input: str = "",
        timeout: float = 400,
        env: dict[str, str] | None = None,
        stderr: Any = None,
        **_named: Any,
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        is_file = command[1] not in ("-c", "-m")
        target, *arguments = command[1 if is_file else 2 :]
        done = run_warm(target, *arguments, environment=env, timeout=timeout, text=input, engines=is_file)
        if stderr is not None:
            stderr.write(done.stderr)
        elif is_file and done.returncode:
            print(done.stderr, file=sys.stderr)
        return done


class WarmServe:
    """`subprocess` for scripts/clients/run.py: its `laguna serve` is forked, and so are the engines of that."""

    STDOUT = subprocess.STDOUT

    @staticmethod
    def Popen(command: list[str], *, cwd: Path, stdout: BinaryIO, stderr: int) -> WarmProcess:  # noqa: N802
        assert command[:2] == [sys.executable, "-m"]
        assert (os.getcwd(), stderr) == (str(cwd), subprocess.STDOUT)
        return warm().start(*command[2:], output=stdout.name, error=stdout.name, engines=True)


def start_engines_warm(yes: bool) -> None:
    """From now on, or no more."""
    engine.subprocess = _Subprocess if yes else subprocess  # type: ignore[attr-defined]
    for module in (row_check, vllm_flags):
        module.subprocess = WarmPrograms if yes else subprocess  # type: ignore[attr-defined]
