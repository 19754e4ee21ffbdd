"""The process jail in which model-written code runs.

Two processes for every program: the *worker* runs the program in the jail (jail.py: namespaces, limits, a filter of
system calls) and serves calls of its function; the *grader* runs the tests, which it alone knows, and calls the worker
over a pipe that carries values and references, never code (rpc.py). What the program does to its own interpreter
(asserts, builtins, __eq__, frames, exit) therefore reaches no verdict. The grader runs the problem's code alone: it has
limits and the filter, but sees the file system and the installed packages, as HumanEval+'s tests want numpy.

Both are killed from outside when the grader has ended or the time is up, and with the jail's first process everything
in it. What keeps the program from files and processes is the caller's choice (`Limits.walls`): namespaces that the jail
makes, those that bubblewrap makes, or Landlock. What cannot be had here is refused, and `find_obstacle` tells why;
choice.py takes the first that can. docs/threat-model.md says who is kept out of what by which of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox.bubblewrap import Enclosed, is_installed
from laguna_serve.evals.sandbox.inside.report import KEY_BYTES, ForgedError, Seal
from laguna_serve.evals.sandbox.library import PACKAGES_FOLDER, find_packages, list_paths
from laguna_serve.evals.sandbox.scratch import Scratch, make_scratch
from laguna_serve.evals.sandbox.servers import ONE_THREAD, START_S, Process, ServerError, spawn
from laguna_serve.evals.sandbox.trial import JailError, Limits, Trial, WallError, Walls
from laguna_serve.evals.sandbox.walls.jail import NOT_WALLED
from laguna_serve.evals.sandbox.walls.landlock import find_version
from laguna_serve.evals.sandbox.walls.other_user import choose_id

GRADER_MEMORY_BYTES, GRADER_FILES = 2 << 30, 256
# How long processes may take to disappear when killed, and to end when done for.
REAP_S, END_S = 30.0, 1.0
CLASS = re.compile(r"^class[ \t]+(\w+)", re.MULTILINE)
# Where no mount bounds what a program writes: how often it is measured, and the share that one file may have.
MEASURE_S, FILE_SHARE = 0.05, 8
OBSTACLE_TRIES = 3
# What the judge says of single tests (grader.py), and where it is counted.
SIGNS = {b"+": "passed", b"!": "weak", b"-": "failed", b"?": "unjudged", b"~": "unmet"}
REMEDY = (
    "allow unprivileged user namespaces, install bubblewrap or boot a kernel with Landlock; or, on a throwaway machine,"
    " do without walls (none), where a program can give itself any reward"
)
PROBE = Problem("probe", "", "f", "def check(candidate):\n    assert candidate() == 1\n", None)
PROBE_PROGRAM = "def f():\n    return 1\n"


@dataclass(frozen=True, slots=True)
class _Pipe:
    reading: BinaryIO
    writing: BinaryIO


@dataclass(slots=True)
class _Child:
    process: Process | Enclosed
    ready_fd: int
    output_fd: int
    output: bytearray = field(default_factory=bytearray)
    # What it said when its walls were up: which ones.
    started: bytes = b""
    # The process that we know is outside of the jail: terminated, it kills the jail's first one and buries it.
    has_watcher: bool = False


def run_trial(
    problem: Problem, program: str, limits: Limits, baseline: dict[str, Any] | None = None, probes: bool = False
) -> Trial:
    """Run the problem's tests on a program. Blocking; may be called from several threads at once.

    `baseline`: the record of the canonical solution's trial. `probes`: universal wrong answers run instead.

    Raises:
        JailError: the jail could not be set up.
    """
    try:
        return _run(problem, program, limits, baseline, probes)
    except ServerError as error:
        raise JailError(str(error)) from error
    except WallError as error:
        raise WallError(f"{error}; {REMEDY}") from None


def _run(problem: Problem, program: str, limits: Limits, baseline: dict[str, Any] | None, probes: bool) -> Trial:
    scratch: Scratch | None = None
    trial = Trial()
    with contextlib.ExitStack() as stack:
        if limits.walls != "namespaces":
            scratch = stack.enter_context(make_scratch(limits.temporary_bytes))
        installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        mounted = limits.walls in ("namespaces", "bubblewrap")
        inside = [PACKAGES_FOLDER] if mounted else installed
        directory = scratch.path if scratch and not mounted else "/tmp"
        worker_config = {
            "program": program,
            "entry_point": problem.entry_point,
            "shared": sorted(set(CLASS.findall(problem.prompt + "\n" + problem.test)) - {problem.entry_point}),
            "packages": inside if limits.packages else [],
            "directory": directory,
            "environment": ({} if mounted else {"TMPDIR": directory}) | (ONE_THREAD if limits.packages else {}),
        }
        key = secrets.token_bytes(KEY_BYTES)
        grader_config = {
            "key": key.hex(),
            "test": problem.test,
            "prompt": problem.prompt,
            "entry_point": problem.entry_point,
            "open_ended": problem.open_ended,
            "baseline": baseline,
            "probes": probes,
            "packages": installed,
            "directory": "/",
            "environment": ONE_THREAD,
        }
        # Sockets: what /proc shows of a pipe can be opened anew, at either end.
        report, reporter = socket.socketpair()
        stack.enter_context(report)
        ours, theirs = socket.socketpair()
        # The children's ends are theirs alone, or nobody would see them end.
        with ours, theirs, reporter:
            worker = stack.enter_context(_start("worker", worker_config, limits, theirs.fileno(), [], scratch=scratch))
            reporting = [reporter.fileno()]
            imported = ("numpy",) if "numpy" in problem.test else ()
            grader = stack.enter_context(
                _start("grader", grader_config, _loosen(limits), ours.fileno(), reporting, imported)
            )
        _listen(trial, worker, grader, report.fileno(), limits, Seal(key), scratch)
        _stop(worker, grader)
        trial.output = bytes(worker.output + grader.output)[: limits.output_bytes]
    return trial


@functools.cache
def find_obstacle(walls: Walls = "namespaces") -> str | None:
    """Why these walls cannot be had here, or None; really tried, and anew where a busy machine may be to blame."""
    obstacle = None
    for _ in range(OBSTACLE_TRIES):
        try:
            trial = _run(PROBE, PROBE_PROGRAM, Limits(walls=walls), None, probes=False)
        except WallError as error:
            return str(error)
        except (JailError, OSError) as error:
            obstacle = str(error)
            continue
        if (trial.passed, trial.ending) == (1, "ended"):
            return None
        obstacle = f"sandbox: expected a program of one line to run, got {trial}"
    return obstacle


@contextlib.contextmanager
def _open_pipe() -> Iterator[_Pipe]:
    reading, writing = os.pipe()
    with open(reading, "rb", 0) as reader, open(writing, "wb", 0) as writer:
        yield _Pipe(reader, writer)


@contextlib.contextmanager
def _start(
    role: str,
    config: dict[str, Any],
    limits: Limits,
    wire: int,
    report: list[int],
    packages: tuple[str, ...] = (),
    scratch: Scratch | None = None,
) -> Iterator[_Child]:
    """A child of a role. `packages`: those that the fork server is to have imported; `scratch`: a worker's folder."""
    config = config | _describe_walls(limits, role)
    mode = config["mode"]
    folders = tuple(config["packages"]) if packages else ()
    with _open_pipe() as ready, _open_pipe() as output:
        with open(os.memfd_create("config"), "w+b") as file, ready.writing, output.writing:
            file.write(json.dumps(config).encode())
            file.seek(0)
            fds = [file.fileno(), output.writing.fileno(), ready.writing.fileno(), wire, *report]
            process: Process | Enclosed
            if scratch and mode == "bubblewrap":
                process = Enclosed(config, scratch.path, fds)
            else:
                process = spawn(role, fds, Path(__file__).resolve().parent, folders, packages)
        child = _Child(process, ready.reading.fileno(), output.reading.fileno(), has_watcher=mode == "namespaces")
        try:
            yield child
        finally:
            try:
                _stop(child)
            finally:
                process.close()


def _loosen(limits: Limits) -> Limits:
    """The grader's limits: it runs the problem's own code, which may be large and may use numpy."""
    cpu_s = math.ceil(limits.wall_s) + 1
    return replace(limits, cpu_s=cpu_s, memory_bytes=GRADER_MEMORY_BYTES, open_files=GRADER_FILES)


def _describe_walls(limits: Limits, role: str) -> dict[str, Any]:
    """What the jail is to put up around a process; the grader has limits and a filter alone.

    Raises:
        JailError: this system lacks it.
    """
    mode = limits.walls if role == "worker" else "judge"
    landlock = find_version() if mode not in ("judge", "none") else 0
    if mode == "landlock" and not landlock:
        raise WallError("sandbox: expected a kernel with Landlock (Linux 5.13 or newer, lsm=…,landlock), got none")
    if mode == "bubblewrap" and not is_installed():
        raise WallError("sandbox: expected bubblewrap to be installed, got no bwrap")
    names = ("cpu_s", "memory_bytes", "file_bytes", "temporary_bytes", "open_files", "threads", "message_bytes")
    walls: dict[str, Any] = {name: getattr(limits, name) for name in names}
    paths = list_paths()
    readable = [*paths["readable"], *find_packages(limits.packages)]
    as_root = os.getuid() == 0
    user = choose_id() if as_root and mode not in ("namespaces", "judge") else None
    if mode in ("bubblewrap", "landlock", "none"):
        walls["file_bytes"] = min(limits.file_bytes, limits.temporary_bytes // FILE_SHARE)
    more = {"mode": mode, "landlock": landlock, "as_root": as_root, "user": user}
    return walls | more | {**paths, "readable": readable}


def _listen(
    trial: Trial, worker: _Child, grader: _Child, report: int, limits: Limits, seal: Seal, scratch: Scratch | None
) -> None:
    """Read what both say until the grader has ended or the time is up, which runs from when both have started.

    Output beyond the limit is read and dropped.

    Raises:
        JailError: one of them did not start.
    """
    deadline, unread = time.monotonic() + START_S, bytearray()
    period = MEASURE_S if scratch else START_S
    measured = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for child in (worker, grader):
            selector.register(child.output_fd, selectors.EVENT_READ, child)
            selector.register(child.ready_fd, selectors.EVENT_READ, child)
        selector.register(report, selectors.EVENT_READ)
        while report in selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, period)):
                data, child = os.read(key.fd, 1 << 16), key.data
                if not data or (child and key.fd == child.ready_fd):
                    selector.unregister(key.fd)
                if child is None:
                    _read_report(trial, data, unread, seal)
                elif key.fd == child.output_fd:
                    child.output += data[: limits.output_bytes - len(child.output)]
                else:
                    child.started = data
                    if worker.started and grader.started:
                        deadline = time.monotonic() + limits.wall_s
            if scratch and not trial.breach and time.monotonic() - measured > MEASURE_S:
                if excess := scratch.find_excess():
                    trial.breach = f"temporary files: {excess}"
                    worker.process.send_signal(signal.SIGKILL)
                measured = time.monotonic()
        trial.timed_out = report in selector.get_map()
    for child in (worker, grader):
        # The grader may have come to its end without the worker: the tests do not load, or it ran probes.
        if not child.started and trial.ending in (None, "gone"):
            _stop(worker, grader)
            said = child.output.decode(errors="replace").strip()[-500:]
            kind = WallError if child.process.poll() == NOT_WALLED else JailError
            raise kind(f"sandbox: expected its processes to start, got {said or 'nothing'}")
    trial.walls = worker.started.decode()
    if trial.ending == "gone":
        with contextlib.suppress(TimeoutError):
            worker.process.wait(END_S)
    grader.process.poll()  # raises where its server has ended: nothing is known of the program then
    trial.exit_code = worker.process.poll()


def _read_report(trial: Trial, data: bytes, unread: bytearray, seal: Seal) -> None:
    """Signs of single tests, then one JSON object, each sealed; a line by anyone else voids them all."""
    unread += data
    while not trial.breach and (end := unread.find(b"\n")) >= 0:
        line = bytes(unread[:end])
        del unread[: end + 1]
        try:
            text = seal.open(line)
        except ForgedError as error:
            trial.passed = trial.weak = 0
            trial.ending, trial.breach = None, f"report: {error}"
            return
        if text.startswith(b"{"):
            said = json.loads(text)
            trial.ending, trial.detail = said["ending"], said["detail"]
            trial.record, trial.probes = said.get("record"), said.get("probes")
            continue
        name = SIGNS[text]
        setattr(trial, name, getattr(trial, name) + 1)


def _stop(*children: _Child) -> None:
    """End the children with all that is in their jails, and wait until it is gone: their outputs are closed then.

    Raises:
        ServerError: a fork server has ended, which ends them too.
    """
    for child in children:
        child.process.send_signal(signal.SIGTERM if child.has_watcher else signal.SIGKILL)
    deadline = time.monotonic() + REAP_S
    for child in children:
        try:
            child.process.wait(END_S)
        except TimeoutError:
            child.process.send_signal(signal.SIGKILL)
            child.process.wait(REAP_S)
        os.set_blocking(child.output_fd, False)
        while time.monotonic() < deadline:
            try:
                if not os.read(child.output_fd, 1 << 16):
                    break
            except BlockingIOError:
                time.sleep(0.001)
