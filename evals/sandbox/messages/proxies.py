"""Objects that stay on one side of the pipe, as the other side sees them.

A proxy is an instance of a class made for the occasion: it has the special methods that the object's own class defines,
and each of them, and every attribute, is a call to the other side. A coroutine becomes a local coroutine that has the
other side run its own.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from laguna_serve.evals.sandbox.messages.forms import Description, Named, Space

if TYPE_CHECKING:
    import asyncio
    import inspect

    from laguna_serve.evals.sandbox.messages.rpc import Peer

_BINARY = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
    "or",
)
ASYNC_SPECIALS = ("__aenter__", "__aexit__", "__anext__")
COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
SPECIALS = (
    *("__len__", "__iter__", "__next__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__reversed__"),
    *("__bool__", "__str__", "__repr__", "__format__", "__bytes__", "__call__", "__enter__", "__exit__", "__aiter__"),
    *("__int__", "__float__", "__complex__", "__index__", "__abs__", "__neg__", "__pos__", "__invert__", "__round__"),
    *("__trunc__", "__floor__", "__ceil__", "__hash__", "__fspath__", *COMPARISONS),
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r", "i") if (side, name) != ("i", "divmod")),
)
# Of these every class has one; proxies forward them only where the class has its own. str and repr always are.
OBJECT_SPECIALS = {name: getattr(object, name) for name in SPECIALS if hasattr(object, name)}
SHOWN = ("__str__", "__repr__")


class ProgramStopIterationError(RuntimeError):
    """A function raised StopIteration: it must not end a loop of the caller's (as PEP 479 has it of generators)."""


class Remote:
    """An object of the other side."""

    __slots__ = ("__weakref__", "_remote_number", "_remote_peer", "_remote_used")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_number", number)
        object.__setattr__(self, "_remote_used", False)

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return make_signature(operate(self, "signature"))
        return operate(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        operate(self, "delattr", name)

    def __copy__(self) -> Any:
        return operate(self, "copy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return operate(self, "deepcopy")

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(operate(self, "instancecheck", value))

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(operate(self, "subclasscheck", value))

    def __dir__(self) -> list[str]:
        return [str(name) for name in operate(self, "dir")]


def operate(remote: Remote, operation: str, *args: Any, **named: Any) -> Any:
    """Ask the other side for an operation on an object of its own."""
    mark_used(remote)
    peer: Peer = object.__getattribute__(remote, "_remote_peer")
    return peer.call(object.__getattribute__(remote, "_remote_number"), operation, args, named)


def get_number(remote: Remote) -> int:
    """Its number on the other side."""
    number: int = object.__getattribute__(remote, "_remote_number")
    return number


def mark_used(remote: Remote) -> None:
    """Something is asked of it."""
    object.__setattr__(remote, "_remote_used", True)


def is_used(remote: Remote) -> bool:
    """Whether anything has been asked of it."""
    return bool(object.__getattribute__(remote, "_remote_used"))


def describe_class(kind: type) -> Description:
    """Describe what a proxy's class is made from."""
    found = {name: _find_special(kind, name) for name in (*SPECIALS, *ASYNC_SPECIALS)}
    specials = [
        name
        for name, method in found.items()
        if method is not None and (name in SHOWN or method is not OBJECT_SPECIALS.get(name))
    ]
    function = issubclass(kind, types.FunctionType | types.BuiltinFunctionType | types.MethodType)
    unhashable = found["__hash__"] is None
    return {"name": kind.__name__, "specials": specials, "function": function, "unhashable": unhashable}


def _find_special(kind: type, name: str) -> Any:
    """Find a special method as Python does: the class's or a base's, not its own class's (as Enum's __bool__)."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def make_proxy(peer: Peer, number: int, description: Any, classes: dict[Any, type[Remote]]) -> Remote:
    """Make the proxy of an object, of a class that is made once for each description."""
    name, specials = str(description["name"]), [str(name) for name in description["specials"]]
    known = (name, *specials, bool(description["function"]), bool(description["unhashable"]))
    if known not in classes:
        space: Space = {"__slots__": (), "__module__": "solution", "__doc__": property(_get_doc)}
        for special in specials:
            if special in SPECIALS:
                space[special] = _make_method(special)
            elif special in ASYNC_SPECIALS:
                space[special] = _make_async_method(special)
        if description["function"]:
            space["__class__"] = property(lambda _: types.FunctionType)
        if "__hash__" not in space:
            space["__hash__"] = None if description["unhashable"] else Remote.__hash__
        classes[known] = type(name, (Remote,), space)
    return classes[known](peer, number)


def _get_doc(remote: Remote) -> Any:
    return operate(remote, "getattr", "__doc__")


def _make_method(special: str) -> Callable[..., Any]:
    if special == "__call__":

        def call(self: Remote, /, *args: Any, **named: Any) -> Any:
            return operate(self, "", *args, **named)

        return call
    if special in COMPARISONS:

        def compare(self: Remote, other: Any) -> Any:
            peer = object.__getattribute__(self, "_remote_peer")
            return peer.compare(self, special, other)

        return compare

    def method(self: Remote, /, *args: Any) -> Any:
        return operate(self, special, *args)

    return method


def _make_async_method(special: str) -> Callable[..., Any]:
    async def method(self: Remote, *args: Any) -> Any:
        return operate(self, special, *args)

    return method


async def run_remotely(peer: Peer, number: int) -> Any:
    """Run a coroutine of the other side."""
    return peer.call(number, "await", (), {})


async def iterate_remotely(peer: Peer, number: int) -> AsyncIterator[Any]:
    """Iterate over an asynchronous generator of the other side."""
    while True:
        try:
            value = peer.call(number, "__anext__", (), {})
        except StopAsyncIteration:
            return
        yield value


def operate_on(value: Any, operation: str, args: list[Any], named: Named, run: Callable[..., Any]) -> Any:
    """Do what `operate` asked for, with an object of this side. `run` runs a coroutine to its end."""
    match operation:
        case "":
            return value(*args, **named)
        case "getattr":
            return _get_code(value) if args[0] == "__code__" else getattr(value, *args)
        case "setattr" | "delattr":
            return getattr(builtins, operation)(value, *args)
        case "dir":
            return dir(value)
        case "copy" | "deepcopy":
            import copy

            return getattr(copy, operation)(value)
        case "signature":
            return describe_signature(value)
        case "instancecheck":
            return isinstance(args[0], value)
        case "subclasscheck":
            return issubclass(args[0], value)
        case "await":
            return run(value)
    if operation in ASYNC_SPECIALS:
        return run(getattr(type(value), operation)(value, *args))
    if operation not in SPECIALS:
        raise TypeError(f"expected an operation, got {operation[:40]}")
    return getattr(type(value), operation)(value, *args)


def _get_code(value: Any) -> types.SimpleNamespace:
    """Tell what may be known of a function's code: its numbers and names."""
    code = value.__code__
    pairs = {name: getattr(code, name) for name in dir(code) if name.startswith("co_") and name != "co_consts"}
    return types.SimpleNamespace(**{k: v for k, v in pairs.items() if isinstance(v, int | str | tuple)})


def describe_signature(value: Any) -> list[list[Any]]:
    """Describe a function's parameters: name, kind, whether there is a default, and the default where it is plain."""
    import inspect  # as asyncio below: each process would pay for it, few need it

    plain = (bool, int, float, str, type(None), tuple, list, dict)
    return [
        [name, int(p.kind), p.default is not p.empty, p.default if isinstance(p.default, plain) else None]
        for name, p in inspect.signature(value).parameters.items()
    ]


def make_signature(parameters: Any) -> inspect.Signature:
    """Make the signature that was described."""
    import inspect

    made = []
    for name, kind, has_default, default in parameters:
        empty = inspect.Parameter.empty
        made.append(inspect.Parameter(name, inspect._ParameterKind(kind), default=default if has_default else empty))
    return inspect.Signature(made)


class AsyncRunner:
    """Runs coroutines to their end, one after another, in one event loop."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, awaitable: Any) -> Any:
        """Run an awaitable to its end; returns its result."""
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()

        async def wait() -> Any:
            return await awaitable

        return self._runner.run(wait())


def is_async(value: Any) -> str:
    """Return the tag of a coroutine or of an asynchronous generator, or nothing."""
    if isinstance(value, types.CoroutineType | Coroutine):
        return "coroutine"
    return "agen" if isinstance(value, types.AsyncGeneratorType) else ""
