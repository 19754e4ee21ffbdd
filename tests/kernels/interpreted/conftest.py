"""Nothing here is collected unless Triton interprets its kernels, which is decided when it is imported."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in an order of their own, not a BLAS's: see fixed_dot.py."""
    from fixed_dot import fixed_order_dot
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", fixed_order_dot)


@pytest.fixture(autouse=True)
def nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's work without what has no effect, which is more than half of it.

    Every call of a device function patches triton.language anew, though the launch has done so, and tl.core remains
    patched after the first time; sums of integers are checked for an overflow that only debug=True would report; and
    each time that NumPy's name of a type is wanted, the table of them is made anew.
    Checked against triton 3.9.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(tl.sum.fn)

    def call(self: interpreter.InterpretedFunction, *args: object, **named: object) -> object:
        return self.rewrite()(*args, **named)

    find, known = interpreter._get_np_dtype, dict[str, Any]()

    def find_np_dtype(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = find(kind)
        return known[kind.name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", find_np_dtype)
    options = interpreter.interpreter_builder.options
    assert not options.debug
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
