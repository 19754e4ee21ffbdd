"""Which names the tests take from the program, as MBPP's do: classes that only the solution defines."""

from __future__ import annotations

import builtins
import dis
from types import CodeType

from laguna_serve.evals.sandbox.messages.forms import Space


def find_missing(code: CodeType, space: Space) -> list[str]:
    """Names that the code reads as globals, and that neither it nor `space` nor Python defines."""
    read: set[str] = set()
    written: set[str] = set()
    waiting = [code]
    while waiting:
        part = waiting.pop()
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(str(step.argval))
            elif step.opname in ("STORE_NAME", "STORE_GLOBAL", "IMPORT_NAME"):
                written.add(str(step.argval))
        waiting += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
    return sorted(name for name in read - written if name not in space and not hasattr(builtins, name))
