"""What the grader notes about a run beyond the tests' own outcome, and compares with the canonical solution's run.

A published test can hold for want of anything to check: an empty answer in a loop, a NaN in `if abs(a - b) > tol`, an
argument that the program emptied. Each such finding is a *weakness* of the test that is just under way: it counts as
passed in the published sense and not in the strict one. With the canonical solution's record at hand the program has to
call for call give a value of a compatible kind; without, the findings that speak for themselves are left.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any

from laguna_serve.evals.sandbox.inside.kinds import (
    CALLABLE,
    FUNCTION,
    MANY,
    MAPPING,
    MAX_LOOKED,
    NOTHING,
    OBJECT,
    RAISED,
    Kind,
    describe_kind,
    find_family,
    has_nan,
    is_compatible,
    show_kind,
)
from laguna_serve.evals.sandbox.messages.proxies import Remote, get_number, is_used
from laguna_serve.evals.sandbox.walls.config import RunRecord

# How many calls' kinds and how many answers are remembered.
MAX_CALLS = 20_000
REFERENCES = frozenset(("object", "yours", "coroutine", "agen"))


def make_key(items: Any, named: Any, nodes: list[Any]) -> str:
    """Make a key that tells one call from another.

    It has the arguments; of what cannot be sent only that there is something.
    """
    plain = [[node[0], None, node[2]] if node[0] in REFERENCES else node for node in nodes]
    text = json.dumps([items, named, plain], separators=(",", ":"), sort_keys=True)
    return f"{hash(text):x}"  # the same in every grader: they are started with one hash seed


class Stream:
    """An iterator of the program's: what it has given so far. `kind`: the answer's, `expected`: the canonical one's."""

    def __init__(self, kind: Kind, expected: Kind | None) -> None:
        self.kind, self.expected, self.count = kind, expected, 0
        self.items: set[Any] | None = set()

    def add(self, item: Any) -> None:
        """Count an item, and keep it among those looked at, at most MAX_LOOKED."""
        self.count += 1
        try:
            if self.items is not None and len(self.items) < MAX_LOOKED:
                self.items.add(None if isinstance(item, Remote) else item)
        except TypeError:
            self.items = None


class Observer:
    """Notes the calls of one run.

    `baseline`: the record of the canonical solution's run, or None. `note` is called with each weakness.
    """

    def __init__(self, baseline: RunRecord | None, test: str, open_ended: bool, note: Callable[[str], None]) -> None:
        self.baseline = baseline
        self.calls = 0
        self.kinds: dict[str, Kind] = {}
        self.weaknesses: set[str] = set()
        self.operations: set[str] = set()
        self.answers: dict[int, Any] = {}
        self._entry_is_class = False
        self._late = False
        self._streams: dict[int, Stream] = {}
        self._tell = note
        self._open_ended = open_ended
        self._mentions_nan = "nan" in test.lower()
        self._seen: collections.Counter[str] = collections.Counter()
        given = {kind[0] for kind in baseline["kinds"].values()} if baseline else set()
        # What a function gives whose work is what it changes or prints is nobody's business.
        self._is_procedure = NOTHING in given and given <= {NOTHING, RAISED}

    @property
    def entry_is_class(self) -> bool:
        """Does the problem ask for a class? As the canonical solution says, or without one the program."""
        return self._entry_is_class and (self.baseline is None or self.baseline["entry_is_class"])

    def set_entry(self, is_class: bool) -> None:
        """Note what the program defines by the name."""
        self._entry_is_class = is_class

    def expect(self, key: str) -> Kind | None:
        """Return what the canonical solution gave for the call that is about to be noted, if that is known."""
        kinds: dict[str, Kind] = self.baseline["kinds"] if self.baseline else {}
        return kinds.get(f"{key}.{self._seen[key]}")

    def may_change(self, key: str) -> bool:
        """Are changes of the arguments written back? Where the canonical solution makes none they are not."""
        expected = self.expect(key)
        return expected is None or bool(expected[4])

    def add_late_change(self) -> bool:
        """Note that an argument changes after its call; False where the canonical solution's run has none of that."""
        self._late = True
        return self.baseline is None or self.baseline["late"]

    def add_answer(self, key: str, value: Any, changed: bool) -> None:
        """Note what a call has given."""
        kind = describe_kind(value, changed)
        if isinstance(value, Remote):
            self._streams[get_number(value)] = Stream(kind, self.expect(key))
        if len(self.answers) < MAX_CALLS and find_family(value) in (MANY, MAPPING, FUNCTION, OBJECT, CALLABLE):
            self.answers[id(value)] = value
        self._compare(key, kind)
        if self.baseline is None and not kind[3] and not self._mentions_nan and has_nan(value):
            self.note("nan", "expected a number, got NaN")

    def add_exception(self, key: str, changed: bool) -> None:
        """Note that a call has raised."""
        self._compare(key, [RAISED, None, None, True, changed])

    def _compare(self, key: str, kind: Kind) -> None:
        self.calls += 1
        expected = self.expect(key)
        if len(self.kinds) < MAX_CALLS:
            self.kinds[f"{key}.{self._seen[key]}"] = kind
        self._seen[key] += 1
        if self._is_procedure and kind[0] != RAISED and expected is not None and expected[0] == NOTHING:
            return
        self._require(kind, expected)

    def _require(self, kind: Kind, expected: Kind | None) -> None:
        if expected is not None and not is_compatible(kind, expected, self._open_ended):
            wanted = f"expected {show_kind(expected)}, as the canonical solution gives"
            self.note("kind", f"{wanted}, got {show_kind(kind)}")

    # Answers that are read item by item: how long they are shows when they have ended.

    def follow(self, number: int, iterator: Any) -> None:
        """Note that an iterator has been taken of the program's object of that number."""
        stream = self._streams.get(number)
        if stream is not None and isinstance(iterator, Remote) and get_number(iterator) != number:
            self._streams[get_number(iterator)] = Stream(stream.kind, stream.expected)

    def add_item(self, number: int, item: Any) -> None:
        """Note that it has given an item."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.add(item)

    def end_stream(self, number: int) -> None:
        """Note that it has no more."""
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        stream.kind[1:3] = [stream.count, None if stream.items is None else len(stream.items)]
        if stream.expected is not None and stream.expected[0] in (MANY, MAPPING, OBJECT, CALLABLE):
            self._require([MANY, *stream.kind[1:]], [MANY, *stream.expected[1:]])

    def note(self, kind: str, text: str, line: int = 0) -> None:
        """Note a weakness, unless the canonical solution's run had it too."""
        name = f"{kind}@{line}"
        if self.baseline is not None and name in self.baseline["weaknesses"]:
            return
        self.weaknesses.add(name)
        self._tell(f"{text} (test line {line})" if line else text)

    def add_operation(self, name: str, decides: bool, plain: bool) -> None:
        """Note what an object of the program was asked (operations.py).

        Where the canonical solution gives a plain value for it, it decides no test. Of a class that the problem asks
        for, objects may be compared with each other.
        """
        self.operations.add(name)
        decides = decides and (plain or not self.entry_is_class)
        if decides and self.baseline is not None and name not in self.baseline["operations"]:
            self.note("operator", f"expected a plain value, got an object, whose {name} was asked for")

    def is_answer(self, value: Any) -> bool:
        """Whether it is what a call has given."""
        return self.answers.get(id(value)) is value and value is not None

    def close(self) -> None:
        """At the end of the tests: answers that nobody looked at, and calls that were not made."""
        if self.baseline is not None:
            if self.calls < self.baseline["calls"]:
                wanted = f"expected {self.baseline['calls']} calls, as the canonical solution gets"
                self.note("calls", f"{wanted}, got {self.calls}")
            return
        for value in self.answers.values():
            looked_at = not isinstance(value, Remote) or is_used(value) or type(value).__name__ in ("Match", "Pattern")
            if not looked_at and not (self.entry_is_class and find_family(value) in (OBJECT, CALLABLE)):
                self.note("unused", f"expected a value to check, got a {type(value).__name__} that no test used")

    def make_record(self, passed: int) -> RunRecord:
        """Record what the canonical solution's run leaves for those of others."""
        return {
            "passed": passed,
            "calls": self.calls,
            "late": self._late,
            "operations": sorted(self.operations),
            "kinds": self.kinds,
            "weaknesses": sorted(self.weaknesses),
            "entry_is_class": self._entry_is_class,
        }
