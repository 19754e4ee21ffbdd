"""Functions on NumPy arrays that Numba compiles: a drafter's small arithmetic on a CPU.

Each is some ten operations on a few thousand numbers at most, of which every one costs torch several microseconds and
NumPy one or two, whatever its size.  vLLM brings Numba along, for its n-gram drafts.

Numba is imported by `prepare`, not with this module: before an engine's worker has begun, vLLM looks into the
attributes of all modules there are, and an object of llvmlite's does not permit it (checked against vLLM 0.32.0,
`_rebind_kernels` of triton_utils/dispatcher.py, and llvmlite 0.47).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Compiled:
    """A function of certain types of arguments that returns nothing; compiled by `prepare`, or else when called."""

    def __init__(self, signature: str, function: Callable[..., None]) -> None:
        self.signature, self.function = signature, function
        self._run: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        """Run it."""
        (self._run or self.compile())(*args)

    def compile(self) -> Callable[..., None]:
        """Compile it once, and keep the result beside its file or in the user's cache where either can be written."""
        if self._run is None:
            import numba

            compile_as: Any = numba.njit
            try:
                self._run = compile_as(self.signature, cache=True)(self.function)
            except RuntimeError:  # neither can be
                self._run = compile_as(self.signature)(self.function)
        assert self._run is not None
        return self._run


_functions: list[Compiled] = []


def compiled(*arguments: str) -> Callable[[Callable[..., None]], Compiled]:
    """Decorate a function whose arguments have these types, as Numba writes them."""

    def decorate(function: Callable[..., None]) -> Compiled:
        _functions.append(Compiled(f"void({', '.join(arguments)})", function))
        return _functions[-1]

    return decorate


def prepare() -> None:
    """Compile what the modules that are imported have, so that no step waits for it."""
    for function in _functions:
        function.compile()
