"""What a program gets, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laguna_serve.evals.sandbox.walls.config import RunRecord

Walls = Literal["namespaces", "bubblewrap", "landlock", "none"]


class JailError(RuntimeError):
    """The jail could not be set up: a fault of the system, never of the program."""


class WallError(JailError):
    """Because this system, or this user on it, cannot have the walls that were asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program gets.

    `walls`: around files and processes; "none" gives them up, so that a program can do what the user can, its own
    reward included. `packages`: names of installed packages that the program may import, as ("numpy",); numpy wants
    memory_bytes of 1 GiB or more.
    """

    wall_s: float = 20.0
    cpu_s: int = 8
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    temporary_bytes: int = 32 << 20
    open_files: int = 64
    threads: int = 32
    message_bytes: int = 16 << 20
    output_bytes: int = 4096
    walls: Walls = "namespaces"
    packages: tuple[str, ...] = ()


@dataclass(slots=True)
class Trial:
    """What came of a program and its tests.

    Attributes:
        weak: tests passed for want of anything to check.
        unjudged: tests of which nothing can be said.
        unmet: 1 where the run as a whole lacks something.
        ending: the grader's last word, None if it had none.
        record: of the calls, to compare other programs with.
        probes: which universal wrong answers pass, as published and strictly.
        exit_code: the worker's, None if it was still running.
        output: the beginning of what both wrote to stdout and stderr.
        walls: those that the worker has said to be up before it ran the program.
        breach: what the program was ended for, having written too much or a report in the grader's name.
    """

    passed: int = 0
    weak: int = 0
    failed: int = 0
    unjudged: int = 0
    unmet: int = 0
    ending: str | None = None
    detail: str = ""
    record: RunRecord | None = None
    probes: dict[str, list[bool]] | None = None
    timed_out: bool = False
    exit_code: int | None = None
    output: bytes = b""
    walls: str = ""
    breach: str = ""
