"""Starting the sandbox's two processes, and ending them with all that is in their jails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from laguna_serve.evals.sandbox.bubblewrap import Enclosed
from laguna_serve.evals.sandbox.scratch import Scratch
from laguna_serve.evals.sandbox.servers import Process, spawn
from laguna_serve.evals.sandbox.walls.config import JailConfig

# How long processes may take to disappear when killed, and to end when done for.
REAP_S, END_S = 30.0, 1.0


@dataclass(frozen=True, slots=True)
class _Pipe:
    reading: BinaryIO
    writing: BinaryIO


@dataclass(slots=True)
class Child:
    """A process of the sandbox, and the host's ends of its pipes."""

    process: Process | Enclosed
    ready_fd: int
    output_fd: int
    output: bytearray = field(default_factory=bytearray)
    # What it said when its walls were up: which ones.
    started: bytes = b""
    # The process that we know is outside of the jail: terminated, it kills the jail's first one and buries it.
    has_watcher: bool = False


@contextlib.contextmanager
def _open_pipe() -> Iterator[_Pipe]:
    reading, writing = os.pipe()
    with open(reading, "rb", 0) as reader, open(writing, "wb", 0) as writer:
        yield _Pipe(reader, writer)


@contextlib.contextmanager
def start_child(
    role: Literal["worker", "grader"],
    config: JailConfig,
    wire: int,
    report: list[int],
    packages: tuple[str, ...] = (),
    scratch: Scratch | None = None,
) -> Iterator[Child]:
    """Start a child of a role, which ends with the context.

    `packages`: those that the fork server is to have imported; `scratch`: a worker's folder.
    """
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
        child = Child(process, ready.reading.fileno(), output.reading.fileno(), has_watcher=mode == "namespaces")
        try:
            yield child
        finally:
            try:
                stop_children(child)
            finally:
                process.close()


def stop_children(*children: Child) -> None:
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
