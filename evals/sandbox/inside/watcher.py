"""Stands in the rewritten tests (instrument.py) where emptiness could satisfy them, and notes it (observe.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from laguna_serve.evals.sandbox.inside.observe import Observer
from laguna_serve.evals.sandbox.messages.proxies import ProgramStopIterationError, Remote


class Watcher:
    """`read_original`: an argument as it was before the program had it."""

    stop_iteration = (StopIteration, ProgramStopIterationError)

    def __init__(self, observer: Observer, read_original: Callable[[Any], Any]) -> None:
        self._observer, self._read_original = observer, read_original

    def original(self, _: int, value: Any) -> Any:
        """Return what an oracle reads of an argument."""
        if isinstance(value, list | tuple) and not self._observer.is_answer(value):
            found = self._read_original(value)
            if found is value:
                parts = [self._read_original(part) for part in value]
                if any(new is not old for new, old in zip(parts, value, strict=True)):
                    return type(value)(parts) if type(value) in (list, tuple) else value
            return found
        return self._read_original(value)

    def loop(self, line: int, items: Iterable[Any]) -> Iterator[Any]:
        """Watch that a loop of tests over an answer is entered."""
        entered = False
        for item in items:
            entered = True
            yield item
        if not entered and self._is_from_program(items):
            self._observer.note("loop", "expected an answer to loop over, got an empty one", line)

    def all(self, line: int, items: Iterable[Any]) -> bool:
        """Python's `all`, which also notes that there was nothing to check."""
        entered = False
        for item in items:
            entered = True
            if not item:
                return False
        if not entered:
            self._observer.note("all", "expected something to check, got nothing", line)
        return True

    def all_of(self, line: int, value: Any, *args: Any, **named: Any) -> Any:
        """`value.all(…)`, of an array; or numpy.all."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and not isinstance(value, Remote):
            checked = args[0] if value is numpy and args else value
            if value is not numpy and not hasattr(value, "all"):
                return value.all(*args, **named)
            if numpy.size(checked) == 0:
                self._observer.note("all", "expected something to check, got an empty array", line)
        return value.all(*args, **named)

    def compare(
        self, line: int, function: Callable[..., Any], first: Any, second: Any, *args: Any, **named: Any
    ) -> Any:
        """numpy's comparisons: of nothing with something they hold."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and getattr(function, "__module__", "").startswith("numpy"):
            try:
                sizes = numpy.size(first), numpy.size(second)
            except Exception:
                sizes = (1, 1)
            if 0 in sizes and sizes[0] != sizes[1]:
                self._observer.note("compare", "expected as many numbers, got an empty answer", line)
        return function(first, second, *args, **named)

    def zip(self, line: int, *items: Any, **named: Any) -> Iterator[Any]:
        """Do as the builtin; an answer must not be the shorter one."""
        iterators = [iter(item) for item in items]
        strict = bool(named.get("strict"))
        while True:
            row = []
            for index, iterator in enumerate(iterators):
                try:
                    row.append(next(iterator))
                except StopIteration:
                    self._end_zip(line, items, iterators, index, strict)
                    return
            if not row:
                return
            yield tuple(row)

    def _end_zip(self, line: int, items: tuple[Any, ...], iterators: list[Any], ended: int, strict: bool) -> None:
        others = iterators[ended + 1 :] if ended == 0 else []
        if ended and strict:
            raise ValueError(f"zip() argument {ended + 1} is shorter than argument {ended}")
        if strict and any(next(other, self) is not self for other in others):
            raise ValueError("zip() argument 2 is longer than argument 1")
        if self._is_from_program(items[ended]):
            lengths = [len(item) for item in items if hasattr(type(item), "__len__") and not isinstance(item, Remote)]
            taken = [len(items[ended])] if hasattr(type(items[ended]), "__len__") else []
            longer = any(next(other, self) is not self for other in others) if not taken else False
            if ended > 0 or longer or (taken and lengths and max(lengths) > taken[0]):
                self._observer.note("zip", "expected as many items as are compared, got fewer", line)

    def _is_from_program(self, items: Any) -> bool:
        return isinstance(items, Remote) or self._observer.is_answer(items)
