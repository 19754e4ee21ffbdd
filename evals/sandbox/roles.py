"""What the sandbox's two processes are told: the worker's program and walls, the grader's tests and limits."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import replace

from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox.bubblewrap import is_installed
from laguna_serve.evals.sandbox.library import PACKAGES_FOLDER, find_packages, list_paths
from laguna_serve.evals.sandbox.scratch import Scratch
from laguna_serve.evals.sandbox.servers import ONE_THREAD
from laguna_serve.evals.sandbox.trial import Limits, WallError
from laguna_serve.evals.sandbox.walls.config import GraderConfig, Mode, RunRecord, WallsConfig, WorkerConfig
from laguna_serve.evals.sandbox.walls.landlock import find_version
from laguna_serve.evals.sandbox.walls.other_user import choose_id

GRADER_MEMORY_BYTES, GRADER_FILES = 2 << 30, 256
CLASS = re.compile(r"^class[ \t]+(\w+)", re.MULTILINE)
# Where no mount bounds what a program writes: the share of it that one file may have.
FILE_SHARE = 8


def make_worker_config(problem: Problem, program: str, limits: Limits, scratch: Scratch | None) -> WorkerConfig:
    """Describe the process that runs the program, behind the walls of `limits`.

    Raises:
        WallError: this system cannot have them.
        JailError: a package that the program may import is not installed.
    """
    mounted = limits.walls in ("namespaces", "bubblewrap")
    directory = scratch.path if scratch and not mounted else "/tmp"
    inside = [PACKAGES_FOLDER] if mounted else _list_installed()
    return {
        **_describe_walls(limits, limits.walls),
        "program": program,
        "entry_point": problem.entry_point,
        "shared": sorted(set(CLASS.findall(problem.prompt + "\n" + problem.test)) - {problem.entry_point}),
        "packages": inside if limits.packages else [],
        "directory": directory,
        "environment": ({} if mounted else {"TMPDIR": directory}) | (ONE_THREAD if limits.packages else {}),
    }


def make_grader_config(
    problem: Problem, limits: Limits, key: bytes, baseline: RunRecord | None, probes: bool
) -> GraderConfig:
    """Describe the process that runs the tests, whose report is sealed with `key`."""
    return {
        **_describe_walls(_loosen(limits), "grader"),
        "key": key.hex(),
        "test": problem.test,
        "prompt": problem.prompt,
        "entry_point": problem.entry_point,
        "open_ended": problem.open_ended,
        "baseline": baseline,
        "probes": probes,
        "packages": _list_installed(),
        "directory": "/",
        "environment": ONE_THREAD,
    }


def _list_installed() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _loosen(limits: Limits) -> Limits:
    """Return the grader's limits: it runs the problem's own code, which may be large and may use numpy."""
    cpu_s = math.ceil(limits.wall_s) + 1
    return replace(limits, cpu_s=cpu_s, memory_bytes=GRADER_MEMORY_BYTES, open_files=GRADER_FILES)


def _describe_walls(limits: Limits, mode: Mode) -> WallsConfig:
    landlock = find_version() if mode not in ("grader", "none") else 0
    if mode == "landlock" and not landlock:
        raise WallError("sandbox: expected a kernel with Landlock (Linux 5.13 or newer, lsm=…,landlock), got none")
    if mode == "bubblewrap" and not is_installed():
        raise WallError("sandbox: expected bubblewrap to be installed, got no bwrap")
    readable, hidden = list_paths()
    as_root = os.getuid() == 0
    bounded = mode in ("bubblewrap", "landlock", "none")
    return {
        "mode": mode,
        "landlock": landlock,
        "as_root": as_root,
        "user": choose_id() if as_root and mode not in ("namespaces", "grader") else None,
        "readable": [*readable, *find_packages(limits.packages)],
        "hidden": hidden,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": min(limits.file_bytes, limits.temporary_bytes // FILE_SHARE) if bounded else limits.file_bytes,
        "temporary_bytes": limits.temporary_bytes,
        "open_files": limits.open_files,
        "threads": limits.threads,
        "message_bytes": limits.message_bytes,
    }
