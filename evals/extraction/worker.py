"""Reads programs out of answers in a process of its own, which may crash, stall or grow without harm.

CPython's parser can be crashed or stalled by what it parses, so an answer is never parsed in the process that asks for
the next one. A worker is started once and serves many answers; each gets CPU seconds, wall seconds and a share of
memory, and a worker that exceeds them ends and is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import resource
import selectors
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from laguna_serve.evals.extraction.extract import ExtractionError, read_program
from laguna_serve.evals.problems.problem import Form, Problem

CPU_S, WALL_S, MEMORY_BYTES = 5, 30.0, 1 << 30
START_S = 60.0
# What may go over the pipe: an answer and its problem, escaped.
MESSAGE_BYTES = 1 << 26
PYTHON = [sys.executable, "-P", "-c", "from laguna_serve.evals.extraction.worker import serve; serve()"]


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was found in an answer.

    `program`: to be graded. `defines`: it parses and defines the function. `error`: why the answer could not be read,
    or empty.
    """

    program: str
    defines: bool
    error: str = ""


class Worker:
    """One process. Not for several threads at once."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            PYTHON, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._served = 0

    def read(self, answer: str, problem: Problem, form: Form) -> Extracted:
        """Read one answer in the worker; afterwards `alive` says whether the worker can serve another."""
        # Not the tests, which may be large and are of no use to it.
        asked = replace(problem, test="", base_test="", canonical_solution=None)
        request = {"answer": answer, "form": form, "problem": asdict(asked)}
        wall_s = WALL_S + (0 if self._served else START_S)
        try:
            reply = json.loads(self._exchange(json.dumps(request).encode() + b"\n", wall_s))
            self._served += 1
            return Extracted(**reply)
        except (OSError, ValueError) as error:
            self.close()
            return Extracted("", False, f"answer: expected code that can be read within {CPU_S} s, got {error}")

    @property
    def alive(self) -> bool:
        """Whether it can serve another answer."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _exchange(self, data: bytes, wall_s: float) -> bytes:
        """Write one line and read one, both bounded.

        Raises:
            OSError: the worker ended, or the time is up.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        writing, reading = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(writing, False)
        deadline, view, reply = time.monotonic() + wall_s, memoryview(data), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(writing, selectors.EVENT_WRITE)
            selector.register(reading, selectors.EVENT_READ)
            while not reply.endswith(b"\n"):
                if (left := deadline - time.monotonic()) <= 0:
                    raise OSError("none in time")
                for key, _ in selector.select(left):
                    if key.fd == writing:
                        view = view[os.write(writing, view) :]
                        if not view:
                            selector.unregister(writing)
                    else:
                        part = os.read(reading, 1 << 16)
                        reply += part
                        if not part or len(reply) > MESSAGE_BYTES:
                            raise OSError("one that ends its reader")
        return bytes(reply)


_idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()


def read_safely(answer: str, problem: Problem, form: Form) -> Extracted:
    """Read an answer in an idle worker, or a new one. Blocking; may be called from several threads at once."""
    worker = _take()
    found = worker.read(answer, problem, form)
    if worker.alive:
        _idle.put(worker)
    return found


def _take() -> Worker:
    while True:
        try:
            worker = _idle.get_nowait()
        except queue.Empty:
            return Worker()
        if worker.alive:
            return worker


def stop_workers() -> None:
    """End those that are idle."""
    with contextlib.suppress(queue.Empty):
        while True:
            _idle.get_nowait().close()


def _forget() -> None:
    """Drop the parent's workers after a fork, without ending them."""
    global _idle
    _idle = queue.SimpleQueue()


os.register_at_fork(after_in_child=_forget)
atexit.register(stop_workers)


def serve() -> None:
    """Serve the worker's side: a request a line on stdin, a reply a line on stdout, until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while line := source.readline(MESSAGE_BYTES):
        _limit_cpu()
        _serve_one(line, sink)


def _limit_cpu() -> None:
    """From now on CPU_S more seconds of processor time; the kernel ends the process that takes more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _serve_one(line: bytes, sink: BinaryIO) -> None:
    request = json.loads(line)
    try:
        problem = Problem(**request["problem"] | {"stops": tuple(request["problem"]["stops"])})
        program, defines = read_program(request["answer"], problem, request["form"])
        found = Extracted(program, defines)
    except (ExtractionError, MemoryError, RecursionError) as error:
        found = Extracted("", False, str(error) or f"answer: {type(error).__name__} while it was read")
    sink.write(json.dumps(asdict(found)).encode() + b"\n")
    sink.flush()
