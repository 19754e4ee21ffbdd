"""What a process in the jail is told, as JSON on its stdin: the walls to put up, and what to do inside."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Mode = Literal["namespaces", "bubblewrap", "landlock", "none", "grader"]


class WallsConfig(TypedDict):
    """The walls around a process, and its limits; those of a grader are limits and a filter alone.

    `landlock`: the version that the kernel has, 0 for none. `user`: the id to change to, where root started it.
    `readable`: (path, real path) of what may be read; `hidden`: folders within them that are to be empty.
    """

    mode: Mode
    landlock: int
    as_root: bool
    user: int | None
    readable: list[tuple[str, str]]
    hidden: list[str]
    cpu_s: int
    memory_bytes: int
    file_bytes: int
    temporary_bytes: int
    open_files: int
    threads: int
    message_bytes: int


class JailConfig(WallsConfig):
    """A process in the jail: its working folder, its environment, and folders of packages for its sys.path."""

    directory: str
    environment: dict[str, str]
    packages: list[str]


class WorkerConfig(JailConfig):
    """The program, the function that is asked for, and classes that the tests share with it by name."""

    program: str
    entry_point: str
    shared: list[str]


class RunRecord(TypedDict):
    """What a run of the canonical solution leaves, to compare those of programs with (inside/observe.py).

    `kinds`: of every call's answer, by the call; `weaknesses`: of single tests; `late`: an argument changed after its
    call; `operations`: what the tests asked of its objects, operators and attributes.
    """

    passed: int
    calls: int
    late: bool
    operations: list[str]
    kinds: dict[str, list[Any]]
    weaknesses: list[str]
    entry_is_class: bool


class GraderConfig(JailConfig):
    """The tests and what they are of; `key`: of the seal on its report; `probes`: wrong answers run instead."""

    key: str
    test: str
    prompt: str
    entry_point: str
    open_ended: bool
    baseline: RunRecord | None
    probes: bool
