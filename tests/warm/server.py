"""The process that has imported what others need: `server.py MODULE…` answers a JSON object a line with another.

{"start": {target, arguments, environment, folder, input, output, error, engines}} → {"pid": …}: forked, and running.
{"poll": pid} → {"status": exit status, minus the signal that ended it, or null while it runs}, as often as it is asked:
who asks may be interrupted before it has read the answer. Each answer has the "id" of its question.

`target` is a file, lines of code, a module, or "module:function", which gets the arguments as they are. Where
`engines`, the engines that it starts are warm, too: it asks here for them, over a socket, as this process asks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO

# The exit statuses of those that have been waited for: the system forgets them.
ENDED: dict[int, int] = {}


def serve() -> dict[str, Any] | None:
    """Answer until the process that has started this one is gone; in a forked process, return what it is to run."""
    first = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    gc.disable()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # not in every environment
        import setproctitle

        # It finds the memory of the arguments by that of the environment, which forks replace.
        setproctitle.getproctitle()
    # What is there now is nobody's garbage: the engines' own collections need not look through it.
    gc.collect()
    gc.freeze()
    gc.enable()
    # Nor does a forked process take apart what was imported before it: thousands of operations of torch's.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    # vLLM thaws all that when an engine ends, and searches it: a copy of every page, four seconds of a busy processor.
    gc.unfreeze = lambda: None
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as ready:
        listener.bind(f"\0laguna-warm-{os.getpid()}")
        listener.listen()
        ready.register(listener, selectors.EVENT_READ)
        ready.register(first[0], selectors.EVENT_READ, first)
        try:
            first[1].write(b"{}\n")
        except BrokenPipeError:  # the tests ended before it was ready
            return None
        while True:
            for key, _ in ready.select():
                if key.data is None:
                    connection, _ = listener.accept()
                    with connection:
                        other = connection.makefile("rwb", buffering=0)
                    ready.register(other, selectors.EVENT_READ, (other, other))
                    continue
                line = b""
                with contextlib.suppress(ConnectionError):  # who asked may have been killed
                    line = key.data[0].readline()
                if not line and key.data is first:
                    return None
                if not line:
                    ready.unregister(key.fileobj)
                    key.data[0].close()
                elif (work := answer(json.loads(line), key.data[1])) is not None:
                    for file in (*(known.fileobj for known in ready.get_map().values()), first[1]):
                        file.close()  # type: ignore[union-attr]
                    return work


def answer(request: dict[str, Any], answers: BinaryIO) -> dict[str, Any] | None:
    """Do what is asked and say so; in a forked process, return what it is to run."""
    said: dict[str, Any]
    if "poll" in request:
        said = {"status": poll(request["poll"])}
    else:
        address = f"\0laguna-warm-{os.getpid()}"
        pid = os.fork()
        if pid == 0:
            return {**request["start"], "address": address}
        ENDED.pop(pid, None)  # the system numbers its processes from the start again
        said = {"pid": pid}
    with contextlib.suppress(ConnectionError):
        answers.write(json.dumps({"id": request["id"], **said}).encode() + b"\n")
    return None


def poll(pid: int) -> int | None:
    if pid not in ENDED:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ENDED[pid] = os.waitstatus_to_exitcode(status)
    return ENDED[pid]


def become(work: dict[str, Any]) -> None:
    """Take on the standard streams, environment, folder and arguments of another program."""
    os.setsid()
    for fd, path in ((1, work["output"]), (2, work["error"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    with open(work["input"], "rb") as asked:
        os.dup2(asked.fileno(), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.set_wakeup_fd(-1)
    take_environment(work["environment"])
    os.chdir(work["folder"])
    sys.argv = ["", *work["arguments"]]
    if work["engines"]:
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from warm import client, engines

        client.Warm.address = work["address"]
        engines.start_engines_warm(True)


def take_environment(environment: dict[str, str]) -> None:
    """What an interpreter and OpenMP read when they start is read here."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    if environment.get("PYTHONFAULTHANDLER"):
        import faulthandler

        faulthandler.enable()


def run(target: str, arguments: list[Any]) -> object:
    if "\n" in target:
        sys.argv[0] = "-c"
        return exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
    if target.endswith(".py"):
        sys.path[0] = os.path.dirname(target)
        sys.argv[0] = target
        return runpy.run_path(target, run_name="__main__")
    sys.path[0] = os.getcwd()  # as of `python -m`
    module, _, function = target.partition(":")
    if function:
        return getattr(importlib.import_module(module), function)(*arguments)
    return runpy.run_module(module, run_name="__main__", alter_sys=True)


def leave(status: Any) -> None:
    """Exit as an interpreter does, but leave the thousands of modules as they are."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1 if isinstance(status, str) else status or 0)


if __name__ == "__main__":
    asked = serve()
    if asked is not None:
        become(asked)
        try:
            result = run(asked["target"], asked["arguments"])
        except SystemExit as end:
            leave(end.code)
        leave(result if isinstance(result, int) else 0)
