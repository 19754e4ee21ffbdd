"""Inside the jail: runs the program under test and serves calls of its function. It knows no test."""

from __future__ import annotations

import builtins
import io
import random
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import Named, Options, Space
from laguna_serve.evals.sandbox.messages.objects import ObjectPeer
from laguna_serve.evals.sandbox.messages.pipe import PeerGone
from laguna_serve.evals.sandbox.messages.proxies import make_proxy, operate_on
from laguna_serve.evals.sandbox.messages.rpc import TEXT_CHARS, Call
from laguna_serve.evals.sandbox.walls.config import WorkerConfig

NAME = "solution"
# What a name of the program's stands for.
MISSING, MODULE, VALUE = "missing", "module", "value"
# Of a program's output, what a test may read.
CAPTURED_CHARS = 1 << 20
# How `input` looks to a program that a test hands its own.
INPUT = {"name": "builtin_function_or_method", "specials": ["__call__"], "function": True, "unhashable": False}


class Capture(io.TextIOBase):
    """A stream that a test reads: what is written goes to the real one too."""

    def __init__(self, real: Any) -> None:
        self._real, self._text, self._kept = real, io.StringIO(), 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Write, and keep what the test may read."""
        if self._kept < CAPTURED_CHARS:
            self._kept += self._text.write(text[: CAPTURED_CHARS - self._kept])
        written: int = self._real.write(text)
        return written

    def flush(self) -> None:
        """Flush the real one."""
        self._real.flush()

    def take(self) -> str:
        """Take what has been written since the last time."""
        text = self._text.getvalue()
        self._text = io.StringIO()
        return text


class WorkerPeer(ObjectPeer):
    """The program's end of the pipe: does what the tests ask for."""

    def __init__(self, fd: int, message_bytes: int, space: Space) -> None:
        super().__init__(fd, message_bytes)
        self._space = space
        self._captures: dict[str, Capture] = {}

    def operate(self, value: Any, operation: str, args: list[Any], named: Named) -> Any:
        """Everything that the tests ask for; "global" gives one of the program's names."""
        if operation == "global":
            return self._find_global(args[0])
        return operate_on(value, operation, args, named, self.runner.run)

    def _find_global(self, name: str) -> tuple[str, Any]:
        """One of the program's names; a module is named, as the tests have it too."""
        if name not in self._space:
            return MISSING, None
        found = self._space[name]
        return (MODULE, found.__name__) if isinstance(found, types.ModuleType) else (VALUE, found)

    def enter(self, options: Options) -> Callable[[], Options]:
        """Streams and the state of `random` that the tests have replaced or set."""
        if not options:
            return dict
        replaced = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
        real_input, outer = builtins.input, self._captures
        if "random" in options:
            version, state, gauss = options["random"]
            random.setstate((version, tuple(state), gauss))
        self._captures = {name: Capture(replaced[name]) for name in options.get("captured", [])}
        for name, capture in self._captures.items():
            setattr(sys, name, capture)
        if "stdin" in options:
            sys.stdin = io.StringIO(options["stdin"])
        if "input" in options:
            builtins.input = make_proxy(self, options["input"], INPUT, self._classes)  # type: ignore[assignment]

        def leave() -> Options:
            more: dict[str, Any] = {"written": self._take_written()}
            if "stdin" in options and isinstance(sys.stdin, io.StringIO):
                more["read"] = sys.stdin.tell()
            for name, stream in replaced.items():
                setattr(sys, name, stream)
            builtins.input, self._captures = real_input, outer
            return more

        return leave

    def list_options(self, call: Call) -> Options:
        """List what has been written so far, so that it stands before what the test writes when it is called back."""
        return {"written": self._take_written()} if self._captures else {}

    def _take_written(self) -> dict[str, str]:
        return {name: capture.take() for name, capture in self._captures.items()}


def play(config: WorkerConfig, wire_fd: int) -> None:
    """Run config["program"], say whether it defines config["entry_point"], and serve until the grader is through."""
    sys.path += config["packages"]
    # Known by its name, as dataclasses and type hints look it up; not "__main__", or its own demonstration would run.
    module = sys.modules[NAME] = types.ModuleType(NAME)
    space = module.__dict__
    peer = WorkerPeer(wire_fd, config["message_bytes"], space)
    peer.export(space)
    try:
        exec(compile(config["program"], NAME + ".py", "exec"), space)
        function = space.get(config["entry_point"])
        if not callable(function):
            raise NameError(f"expected a function {config['entry_point']}, got none")
        entry, _ = peer.refer(function) or (None, None)
    except ModuleNotFoundError as error:
        peer.say("lacks", [str(error.name), describe(error)])
        return
    except BaseException as error:
        peer.say("broken", describe(error))
        return
    peer.shared = {
        name: kind
        for name in config["shared"]
        if isinstance(kind := space.get(name), type) and kind.__module__ == NAME and _is_plain(kind)
    }
    peer.say("ready", {"entry": entry, "shared": list(peer.shared)})
    try:
        peer.serve()
    except PeerGone:
        return


def _is_plain(kind: type) -> bool:
    """Whether its instances can be made without its constructor."""
    return issubclass(kind, BaseException) or kind.__new__ is object.__new__


def describe(error: BaseException) -> str:
    """Describe the exception in one line, with the program's line where it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == NAME + ".py"]
    where = f" (line {lines[-1]})" if lines else ""
    try:
        return f"{type(error).__name__}: {error}{where}"[:TEXT_CHARS]
    except Exception:
        return type(error).__name__
