"""The tests' end of the pipe: the program's function as a value, and what its calls may do to the tests' own objects.

The program may call back what it was given. Of the tests' objects it reaches public attributes and special methods of
instances, and calls functions; never their frames, globals, modules or classes' insides.
"""

from __future__ import annotations

import builtins
import importlib
import io
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.inside.observe import Observer, make_key
from laguna_serve.evals.sandbox.inside.operations import find_asked
from laguna_serve.evals.sandbox.inside.worker import MODULE, VALUE
from laguna_serve.evals.sandbox.messages.forms import Named, Options, Space
from laguna_serve.evals.sandbox.messages.objects import ObjectPeer
from laguna_serve.evals.sandbox.messages.pipe import PeerExit, PeerGone, Unsendable
from laguna_serve.evals.sandbox.messages.proxies import (
    ASYNC_SPECIALS,
    SPECIALS,
    ProgramStopIterationError,
    Remote,
    operate_on,
)
from laguna_serve.evals.sandbox.messages.rpc import CHANGEABLE, Call
from laguna_serve.evals.sandbox.messages.values import Decoder, Node

SPACE, ENTRY = 0, 1
NEXT = ("__next__", "__anext__")
# Objects whose attributes lead out of the tests: only these may be read of them.
GENERATORS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
CLOSED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, *GENERATORS)
OF_CLOSED = frozenset(("__name__", "__qualname__", "__doc__", "send", "throw", "close", "asend", "athrow", "aclose"))
ALWAYS = frozenset(("__name__", "__doc__"))
REAL = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
REAL_INPUT = builtins.input
WRITTEN_CHARS = 1 << 20
# Exceptions that end an interpreter reach the tests only where they name them.
EXITS = ("SystemExit", "KeyboardInterrupt")


class RemoteProgram(ObjectPeer):
    """The program. `test` is the tests' source."""

    MISSING = object()

    def __init__(self, fd: int, message_bytes: int, observer: Observer, test: str) -> None:
        super().__init__(fd, message_bytes)
        self._observer, self._test = observer, test
        self._random_state = self._follow_random()
        self._originals: dict[int, tuple[Any, list[Node], int, list[Any]]] = {}
        self._key, self._changed = "", False

    def begin(self, node: Node, shared: Space) -> Any:
        """Return the program's function, as the tests call it."""
        self.shared = {name: kind for name, kind in shared.items() if isinstance(kind, type)}
        try:
            candidate = self.resolve(str(node[0]), node[1], [])
        except (LookupError, TypeError, ValueError) as error:
            raise PeerGone(f"expected a program, got {str(node)[:60]}") from error
        self._observer.set_entry(isinstance(candidate, type) or bool(node[1]["class"]))
        return candidate

    def read_global(self, name: str) -> Any:
        """Read what the program calls by that name, or MISSING. A module of the standard library is the tests' own."""
        match self.call(SPACE, "global", (name,), {}):
            case (kind, value) if kind == VALUE:
                return value
            case (kind, str(module)) if kind == MODULE and module.partition(".")[0] in sys.stdlib_module_names:
                return importlib.import_module(module)
        return self.MISSING

    # What the program may ask for.

    def operate(self, value: Any, operation: str, args: list[Any], named: Named) -> Any:
        """Serve what is harmless."""
        if operation in ("getattr", "setattr", "delattr"):
            return self._reach(value, operation, args)
        if (
            operation == "signature"
            or operation in ("", "await")
            or operation in SPECIALS
            or operation in ASYNC_SPECIALS
        ):
            return operate_on(value, operation, args, named, _run_apart)
        raise TypeError(f"expected a call or a special method, got {operation[:40]}")

    def _reach(self, value: Any, operation: str, args: list[Any]) -> Any:
        name = args[0]
        if not isinstance(name, str):
            raise TypeError("attribute name must be string")
        closed = isinstance(value, CLOSED)
        if operation == "getattr" and (name in OF_CLOSED if closed else not name.startswith("_") or name in ALWAYS):
            found = getattr(value, name)
            if isinstance(found, types.ModuleType | types.FrameType | types.CodeType):
                raise Unsendable(f"expected a value that can be sent, got a {type(found).__name__}")
            return found
        if closed or name.startswith("_"):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return operate_on(value, operation, args, {}, _run_apart)

    def compare(self, remote: Remote, operation: str, other: Any) -> Any:
        """Compare an object of the program with a value of the tests.

        What the object says of itself and a plain value decides no test, unless the problem asks for its class.
        """
        if isinstance(other, Remote) or self._observer.entry_is_class:
            return super().compare(remote, operation, other)
        said = f"{type(remote).__name__} compares itself with a value of type {type(other).__name__}"
        raise Unsendable(f"expected a plain value to compare, got an object: {said}")

    def is_exit(self, names: list[str]) -> bool:
        """SystemExit is taken for what it is where the tests name it."""
        known = names[0].rpartition(":")[2]
        return super().is_exit(names) and not (known in EXITS and known in self._test)

    # The calls of its function.

    def call(self, number: int, operation: str, args: tuple[Any, ...], named: Named) -> Any:
        """Call it; StopIteration of a function ends no loop of the tests', and calls of the entry are observed."""
        observed = number == ENTRY and not operation
        outer = self._key, self._changed
        self._key, self._changed = "", False
        try:
            value = super().call(number, operation, args, named)
            if number != SPACE and (asked := find_asked(operation, args, value)) is not None:
                self._observer.add_operation(*asked)
            if observed:
                self._observer.add_answer(self._key, value, self._changed)
            elif operation == "__iter__":
                self._observer.follow(number, value)
            elif operation in NEXT:
                self._observer.add_item(number, value)
            return value
        except (PeerGone, Unsendable):
            raise
        except (StopIteration, StopAsyncIteration) as error:
            if observed:
                self._observer.add_exception(self._key, self._changed)
            if operation in NEXT:
                self._observer.end_stream(number)
                raise
            raise ProgramStopIterationError(f"{type(error).__name__}: {error}") from None
        except (Exception, PeerExit, SystemExit, KeyboardInterrupt):
            if observed:
                self._observer.add_exception(self._key, self._changed)
            raise
        finally:
            self._key, self._changed = outer

    def list_options(self, call: Call) -> Options:
        """Streams that the tests have replaced, and the state of `random` where they have set it."""
        if call.number == ENTRY and not call.operation:
            self._key = make_key(call.items, call.named, call.encoder.nodes)
        options: Options = {}
        captured = [name for name in ("stdout", "stderr") if getattr(sys, name) is not REAL[name]]
        if captured:
            options["captured"] = captured
        if sys.stdin is not REAL["stdin"] and isinstance(sys.stdin, io.StringIO):
            at = sys.stdin.tell()
            options["stdin"] = sys.stdin.read(WRITTEN_CHARS)
            sys.stdin.seek(at)
        if builtins.input is not REAL_INPUT:
            options["input"] = self.export(builtins.input)
        if (state := self._random_state()) is not None:
            options["random"] = state
        return options

    def take_options(self, options: Options) -> None:
        """Take what the program wrote and read."""
        written = options.get("written", {})
        for name in ("stdout", "stderr"):
            text = written.get(name)
            if text and getattr(sys, name) is not REAL[name]:
                getattr(sys, name).write(str(text)[:WRITTEN_CHARS])
        if "read" in options and isinstance(sys.stdin, io.StringIO):
            sys.stdin.read(int(options["read"]))

    def enter(self, options: Options) -> Callable[[], Options]:
        """Take what the program wrote before it called back."""
        self.take_options(options)
        return dict

    def take_changes(self, call: Call, decoder: Decoder) -> None:
        """Write back what a call has changed; where the canonical solution changes nothing, into copies."""
        self._changed = bool(call.changes)
        if not call.changes or call.number != ENTRY or call.operation:
            super().take_changes(call, decoder)
            return
        if not self._observer.may_change(self._key):
            copies = self._copy(call.encoder.nodes)
            decoder.replace_own(copies)
            for index, node in call.changes.items():
                decoder.fill(copies[index], node)
            return
        for index, node in enumerate(call.encoder.nodes):
            if node[0] in CHANGEABLE:
                value = call.encoder.objects[index]
                self._originals[id(value)] = (value, call.encoder.nodes, index, [])
        super().take_changes(call, decoder)

    def may_change_kept(self) -> bool:
        """Where the canonical solution makes no late changes, nobody does."""
        return self._observer.add_late_change()

    def take_result(self, call: Call, item: Any, decoder: Decoder) -> Any:
        """Take the result; an argument that is itself the answer has no original any more."""
        value = super().take_result(call, item, decoder)
        self._originals.pop(id(value), None)
        return value

    def read_original(self, value: Any) -> Any:
        """Read an argument as it was before the last call that changed it."""
        found = self._originals.get(id(value))
        if found is None or found[0] is not value:
            return value
        _, nodes, index, copies = found
        if not copies:
            copies += self._copy(nodes)
        return copies[index]

    def _copy(self, nodes: list[Node]) -> list[Any]:
        """Copy the objects of a call's nodes once more."""
        return Decoder(nodes, self._resolve_own, self.bounds).objects

    def _resolve_own(self, tag: str, extra: Any, values: list[Any]) -> Any:
        if tag == "yours":
            return self._proxies[int(extra)]
        if tag == "object":
            return self.exported[extra["number"]]
        if tag in ("coroutine", "agen"):
            return self.exported[int(extra)]
        return self.resolve(tag, extra, values)

    def _follow_random(self) -> Callable[[], Any]:
        """Follow `random.seed` of the tests.

        From then on the program's generator is where the tests' is, each time that they have changed theirs.
        """
        state: dict[str, Any] = {"followed": False, "sent": None}
        seed, setstate = random.seed, random.setstate

        def follow(function: Callable[..., None]) -> Callable[..., None]:
            def wrapper(*args: Any, **named: Any) -> None:
                function(*args, **named)
                state["followed"], state["sent"] = True, None

            return wrapper

        def read() -> Any:
            if not state["followed"]:
                return None
            now = random.getstate()
            if now == state["sent"]:
                return None
            state["sent"] = now
            return [now[0], list(now[1]), now[2]]

        random.seed, random.setstate = follow(seed), follow(setstate)
        return read


def _run_apart(awaitable: Any) -> Any:
    """Run a coroutine of the tests' while their own event loop waits for the program."""
    import asyncio
    import threading

    result: list[Any] = []

    async def wait() -> Any:
        return await awaitable

    def work() -> None:
        try:
            result.append((asyncio.run(wait()), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value
