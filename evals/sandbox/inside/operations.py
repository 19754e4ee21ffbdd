"""What an object of the program is asked that can answer a test by itself: operators that compare or compute, methods.

A plain value answers these as Python has it, an object as its class says: `got - want` may be nothing, any comparison
true. So what the tests ask of a program's objects is held against what they ask of the canonical solution's
(observe.py). A value that an object gives decides nothing by itself: it is compared in its turn.
"""

from __future__ import annotations

import re
from typing import Any

from laguna_serve.evals.sandbox.messages.proxies import COMPARISONS, Remote

COMPUTED = re.compile(r"__[ri]?(add|sub|mul|matmul|truediv|floordiv|mod|divmod|pow|lshift|rshift|and|xor|or)__")
# A class has one of several that do the same.
SAME = {"__ne__": "__eq__", "__le__": "__lt__", "__gt__": "__lt__", "__ge__": "__lt__"}
# Where an object is walked through, `in` may be left to that.
WALKED = ("__iter__", "__next__", "__getitem__")
CONTAINS = "__contains__"


def find_asked(operation: str, args: tuple[Any, ...], value: Any) -> tuple[str, bool, bool] | None:
    """Find what was asked, and got `value`: its name, whether that decides, and whether a plain value was beside it."""
    plain = any(arg is not None and not isinstance(arg, Remote) for arg in args)
    if operation in COMPARISONS:
        return SAME.get(operation, operation), True, plain
    if operation == CONTAINS or operation in WALKED:
        return CONTAINS, operation == CONTAINS, plain
    if found := COMPUTED.fullmatch(operation):
        return f"__{found[1]}__", True, plain
    if operation == "getattr" and isinstance(value, Remote) and not str(args[0]).startswith("_"):
        return str(args[0]), True, False
    return None
