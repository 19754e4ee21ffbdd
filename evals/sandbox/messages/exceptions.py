"""Exceptions of the other side: they are copied.

An exception class of the other side becomes one of the same name here, below the nearest class that both sides have.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from typing import Any

from laguna_serve.evals.sandbox.messages.forms import Description, Named

# Exception classes that mean something to a test runner are never taken for the runner's own.
RUNNERS = ("unittest", "doctest", "bdb", "pdb", "test", "pytest", "_pytest")


def list_lineage(kind: type) -> list[str]:
    """List an exception class and its bases, as module:name."""
    return [f"{base.__module__}:{base.__qualname__}" for base in kind.__mro__ if base is not object]


def describe_exception(error: BaseException) -> Description:
    """Describe what is copied of an exception."""
    attributes = {
        name: value
        for name in (*vars(error), *(("errno", "strerror", "filename") if isinstance(error, OSError) else ()))
        if (value := getattr(error, name, None)) is not None
    }
    args = tuple(error.args) if isinstance(error.args, tuple) else ()
    return {
        "names": list_lineage(type(error)),
        "text": str(error)[:2000],
        "args": {str(index): value for index, value in enumerate(args)},
        "attributes": attributes,
        "cause": error.__cause__,
    }


def make_exception_class(
    names: list[str], made: dict[tuple[str, ...], type[BaseException]], own: Mapping[str, type]
) -> type[BaseException]:
    """Make the class of that lineage: one that both sides have, or a new one below the nearest of them.

    `own`: classes of this side that stand for those of the same name there.
    """
    key = tuple(names)
    if not names:
        return Exception
    if (known := _find_exception_class(names[0], own)) is not None:
        return known
    if key not in made:
        base = make_exception_class(names[1:], made, own)
        name = names[0].rpartition(":")[2].rpartition(".")[2]
        made[key] = type(name, (base,), {"__module__": "solution", "__str__": _show_exception, "__init__": _init})
    return made[key]


def _init(self: BaseException, *args: Any, **named: Any) -> None:
    self.args = args


def _show_exception(self: BaseException) -> str:
    text = self.__dict__.get("_remote_text")
    return text if isinstance(text, str) else BaseException.__str__(self)


def _find_exception_class(name: str, own: Mapping[str, type]) -> type[BaseException] | None:
    module, _, qualname = name.partition(":")
    if module == "builtins":
        found = getattr(builtins, qualname, None)
    elif module == "solution":
        found = own.get(qualname)
    elif module.partition(".")[0] in RUNNERS or module.partition(".")[0] not in sys.stdlib_module_names:
        found = None
    else:
        found = getattr(sys.modules.get(module), qualname, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def make_exception(
    kind: type[BaseException], args: list[Any], attributes: Named, text: str, made_here: bool
) -> BaseException:
    """Make the copy of an exception. `made_here`: its class was made for it, so nothing of its constructor is known."""
    try:
        error = kind.__new__(kind, *args) if made_here else kind(*args)
    except Exception:
        error = kind.__new__(kind)
    error.args = tuple(args)
    for name, value in attributes.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):
            continue
    if made_here:
        error.__dict__["_remote_text"] = text
    return error
