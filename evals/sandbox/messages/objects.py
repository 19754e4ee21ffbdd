"""What both ends of the pipe do with objects that have no form of their own: proxies, shared classes, exceptions.

A class that the problem itself gives to both sides (a `Node` of its prompt) is *shared*: its instances are copied,
attribute by attribute, and are instances of the receiver's own class of that name.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.messages.exceptions import (
    describe_exception,
    list_lineage,
    make_exception,
    make_exception_class,
)
from laguna_serve.evals.sandbox.messages.forms import Description, MalformedError, Node, list_attributes
from laguna_serve.evals.sandbox.messages.pipe import PeerExit
from laguna_serve.evals.sandbox.messages.proxies import (
    AsyncRunner,
    Remote,
    describe_class,
    get_number,
    is_async,
    iterate_remotely,
    make_proxy,
    mark_used,
    run_remotely,
)
from laguna_serve.evals.sandbox.messages.rpc import Call, Peer

Referred = tuple[Node, list[Any]]


class ObjectPeer(Peer):
    """A peer that passes any object. `shared`: this side's classes that both sides have, by name."""

    def __init__(self, fd: int, message_bytes: int) -> None:
        super().__init__(fd, message_bytes)
        self.shared: dict[str, type] = {}
        self.runner = AsyncRunner()
        self._proxies: dict[int, Remote] = {}
        self._classes: dict[Any, type[Remote]] = {}
        self._exceptions: dict[tuple[str, ...], type[BaseException]] = {}

    def refer(self, value: Any) -> Referred | None:
        """Send a proxy back as the other side's object; instances of shared classes and exceptions are copied."""
        if isinstance(value, Remote):
            mark_used(value)
            return ["yours", get_number(value), []], []
        if isinstance(value, types.ModuleType | types.FrameType | types.CodeType | types.TracebackType):
            return None
        if isinstance(value, BaseException):
            said = describe_exception(value)
            head = {"names": said["names"], "text": said["text"]}
            return ["exception", head, []], [tuple(said["args"].values()), said["attributes"]]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["excclass", list_lineage(value), []], []
        kind = type(value)
        if self.shared.get(kind.__name__) is kind:
            return ["record", kind.__name__, []], list_attributes(value)
        if tag := is_async(value):
            return [tag, self.export(value), []], []
        description = {"number": self.export(value), "class": isinstance(value, type), **describe_class(kind)}
        return ["object", description, []], []

    def resolve(self, tag: str, extra: Any, values: list[Any]) -> Any:
        """Make the value of what the other side's `refer` made."""
        match tag:
            case "yours":
                return self.exported[int(extra)]
            case "object":
                number = int(extra["number"])
                if number not in self._proxies:
                    self._proxies[number] = make_proxy(self, number, extra, self._classes)
                return self._proxies[number]
            case "coroutine":
                return run_remotely(self, int(extra))
            case "agen":
                return iterate_remotely(self, int(extra))
            case "record":
                kind = self.shared[extra]
                return object.__new__(kind)
            case "excclass":
                return self.find_exception_class([str(name) for name in extra])
            case "exception":
                args, attributes = values
                return self._copy_exception([str(name) for name in extra["names"]], args, attributes, extra["text"])
        raise MalformedError(f"a node of kind {str(tag)[:20]}")

    def find_exception_class(self, names: list[str]) -> type[BaseException]:
        """Find this side's class for one of the other side."""
        return make_exception_class(names, self._exceptions, self.shared)

    def describe_error(self, error: BaseException) -> Description:
        """Everything of an exception that can be copied."""
        try:
            return describe_exception(error)
        except Exception:
            return {"names": list_lineage(type(error)), "text": "", "args": {}, "attributes": {}, "cause": None}

    def make_error(self, description: Description, decode: Callable[[Any], Any], call: Call) -> BaseException:
        """Make a copy of the other side's exception; PeerExit of one that would end this side."""
        names = [str(name) for name in decode(description["names"])]
        args = [decode(item) for item in description["args"].values()]
        attributes = {str(name): decode(item) for name, item in description["attributes"].items()}
        text = str(decode(description["text"]))
        if self.is_exit(names):
            name = names[0].rpartition(":")[2]
            return PeerExit(f"{name}: {text}" if text else name)
        error = self._copy_exception(names, args, attributes, text)
        cause = decode(description["cause"])
        if isinstance(cause, BaseException):
            error.__cause__ = cause
        return error

    def is_exit(self, names: list[str]) -> bool:
        """Whether an exception of that lineage would end this side."""
        return "builtins:Exception" not in names

    def _copy_exception(self, names: list[str], args: Any, attributes: Any, text: str) -> BaseException:
        kind = self.find_exception_class(names)
        made_here = kind in self._exceptions.values()
        return make_exception(kind, list(args), {str(k): v for k, v in attributes.items()}, text, made_here)

    def compare(self, remote: Remote, operation: str, other: Any) -> Any:
        """Compare something with an object of the other side."""
        mark_used(remote)
        return self.call(get_number(remote), operation, (other,), {})
