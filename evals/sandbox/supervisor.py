"""The process jail in which model-written code runs.

Two processes for every program: the *worker* runs the program in the jail (walls/jail.py: namespaces, limits, a filter
of system calls) and serves calls of its function; the *grader* runs the tests, which it alone knows, and calls the
worker over a pipe that carries values and references, never code (messages/rpc.py). What the program does to its own
interpreter (asserts, builtins, __eq__, frames, exit) therefore reaches no verdict. The grader runs the problem's code
alone: it has limits and the filter, but sees the file system and the installed packages, as HumanEval+'s tests want
numpy.

Both are killed from outside when the grader has ended or the time is up, and with the jail's first process everything
in it. What keeps the program from files and processes is the caller's choice (`Limits.walls`): namespaces that the jail
makes, those that bubblewrap makes, or Landlock. What cannot be had here is refused, and `find_obstacle` tells why;
choice.py takes the first that can. docs/threat-model.md says who is kept out of what by which of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import socket
import time

from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox.child import END_S, Child, start_child, stop_children
from laguna_serve.evals.sandbox.inside.report import KEY_BYTES, ForgedError, Seal
from laguna_serve.evals.sandbox.roles import make_grader_config, make_worker_config
from laguna_serve.evals.sandbox.scratch import Scratch, make_scratch
from laguna_serve.evals.sandbox.servers import START_S, ServerError
from laguna_serve.evals.sandbox.trial import JailError, Limits, Trial, WallError, Walls
from laguna_serve.evals.sandbox.walls.config import RunRecord
from laguna_serve.evals.sandbox.walls.jail import NOT_WALLED

# How often it is measured what a program has written where no mount bounds it.
MEASURE_S = 0.05
OBSTACLE_TRIES = 3
# What the grader says of single tests (inside/grader.py), and where it is counted.
SIGNS = {b"+": "passed", b"!": "weak", b"-": "failed", b"?": "unjudged", b"~": "unmet"}
REMEDY = (
    "allow unprivileged user namespaces, install bubblewrap or boot a kernel with Landlock; or, on a throwaway machine,"
    " do without walls (none), where a program can give itself any reward"
)
PROBE = Problem("probe", "", "f", "def check(candidate):\n    assert candidate() == 1\n", None)
PROBE_PROGRAM = "def f():\n    return 1\n"


def run_trial(
    problem: Problem, program: str, limits: Limits, baseline: RunRecord | None = None, probes: bool = False
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


def _run(problem: Problem, program: str, limits: Limits, baseline: RunRecord | None, probes: bool) -> Trial:
    scratch: Scratch | None = None
    trial = Trial()
    with contextlib.ExitStack() as stack:
        if limits.walls != "namespaces":
            scratch = stack.enter_context(make_scratch(limits.temporary_bytes))
        worker_config = make_worker_config(problem, program, limits, scratch)
        key = secrets.token_bytes(KEY_BYTES)
        grader_config = make_grader_config(problem, limits, key, baseline, probes)
        # Sockets: what /proc shows of a pipe can be opened anew, at either end.
        report, reporter = socket.socketpair()
        stack.enter_context(report)
        ours, theirs = socket.socketpair()
        # The children's ends are theirs alone, or nobody would see them end.
        with ours, theirs, reporter:
            worker = stack.enter_context(start_child("worker", worker_config, theirs.fileno(), [], scratch=scratch))
            reporting = [reporter.fileno()]
            imported = ("numpy",) if "numpy" in problem.test else ()
            grader = stack.enter_context(start_child("grader", grader_config, ours.fileno(), reporting, imported))
        _listen(trial, worker, grader, report.fileno(), limits, Seal(key), scratch)
        stop_children(worker, grader)
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


def _listen(
    trial: Trial, worker: Child, grader: Child, report: int, limits: Limits, seal: Seal, scratch: Scratch | None
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
            stop_children(worker, grader)
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
