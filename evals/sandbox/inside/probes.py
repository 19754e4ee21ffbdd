"""Wrong answers that say nothing of a problem: which tests can be passed by them is a fault of the tests.

They are the project's own code, so they run in the grader itself; one run of it tries them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from laguna_serve.evals.sandbox.inside.observe import Observer, make_key
from laguna_serve.evals.sandbox.messages.proxies import ProgramStopIterationError
from laguna_serve.evals.sandbox.messages.values import Encoder, UnsendableError

PROBE_S = 2.0


class OutOfTime(BaseException):
    """The time of one probe is up."""


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **named: value


def _raise(kind: type[BaseException]) -> Callable[..., Any]:
    def fail(*args: Any, **named: Any) -> Any:
        raise kind

    return fail


def _first(*args: Any, **named: Any) -> Any:
    return args[0] if args else None


def _empty_first(*args: Any, **named: Any) -> Any:
    for arg in args:
        if isinstance(arg, list | dict | set | bytearray):
            arg.clear()
    return _first(*args)


def _iterate(*args: Any, **named: Any) -> Iterator[Any]:
    return iter(())


CONSTANTS: tuple[Any, ...] = (None, True, False, 0, 1, -1, 0.0, "", "a", b"", ())
PROBES: dict[str, Callable[..., Any]] = {
    **{f"return {value!r}": _constant(value) for value in CONSTANTS},
    "return {}": lambda *args, **named: {},
    "return []": lambda *args, **named: [],
    "return [[]]": lambda *args, **named: [[]],
    "return ([],)": lambda *args, **named: ([],),
    "return set()": lambda *args, **named: set(),
    "return nan": _constant(math.nan),
    "return inf": _constant(math.inf),
    "return its argument": _first,
    "return all arguments": lambda *args, **named: args,
    "empty the arguments": _empty_first,
    "return an empty iterator": _iterate,
    "return an endless iterator": lambda *args, **named: itertools.count(),
    "return a function": lambda *args, **named: _constant(True),
    "raise StopIteration": _raise(StopIteration),
    "raise ValueError": _raise(ValueError),
    "raise AssertionError": _raise(AssertionError),
    "raise SystemExit": _raise(SystemExit),
}


class ProbeCandidate:
    """A probe in the place of the program's function."""

    def __init__(self, function: Callable[..., Any], observer: Observer) -> None:
        self._function, self._observer = function, observer

    def __call__(self, *args: Any, **named: Any) -> Any:
        encoder = Encoder(lambda value: (["object", {}, []], []))
        try:
            items = [encoder.encode(arg) for arg in args]
            key = make_key(items, {name: encoder.encode(arg) for name, arg in named.items()}, encoder.nodes)
        except UnsendableError:
            key = ""
        changes = self._observer.may_change(key)
        if not changes:
            import copy

            args, named = copy.deepcopy((args, named))
        try:
            value = self._function(*args, **named)
        except StopIteration as error:
            self._observer.add_exception(key, changed=False)
            raise ProgramStopIterationError("StopIteration") from error
        except BaseException:
            self._observer.add_exception(key, changed=False)
            raise
        self._observer.add_answer(key, value, changed=False)
        if self._observer.baseline is None and (callable(value) or hasattr(value, "__next__")):
            # A program's would be a proxy that no test can look into by accident.
            self._observer.note("unused", "expected a plain value")
        return value
