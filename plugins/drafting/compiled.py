"""Functions on NumPy arrays that Numba compiles: a drafter's small arithmetic on a CPU.

Each is some ten operations on a few thousand numbers at most, of which every one costs torch several microseconds and
NumPy one or two, whatever its size. vLLM brings Numba along, for its n-gram drafts.

Numba is imported when a function is prepared, where one is needed: it takes 100 MiB, and before an engine's worker has
begun, vLLM looks into the attributes of all modules there are, which an object of llvmlite's does not permit (vLLM
0.32.0, `_rebind_kernels` of triton_utils/dispatcher.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Compiled:
    """A function of certain types of arguments that returns nothing; compiled by `prepare`, or else when called."""

    def __init__(self, signature: str, function: Callable[..., None]) -> None:
        self.signature, self.function = signature, function
        self._run: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        """Run it, compiled if it is not yet."""
        (self._run or self.prepare())(*args)

    def prepare(self) -> Callable[..., None]:
        """Compile it once, so that no step waits for it."""
        if self._run is None:
            self._run = self._compile()
        return self._run

    def _compile(self) -> Callable[..., None]:
        """Compile it, and keep the result beside its file or in the user's cache where either can be written."""
        import numba

        compile_as: Any = numba.njit
        try:
            return compile_as(self.signature, cache=True)(self.function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither can be
            return compile_as(self.signature)(self.function)  # type: ignore[no-any-return]


def compiled(*arguments: str) -> Callable[[Callable[..., None]], Compiled]:
    """Decorate a function whose arguments have these types, as Numba writes them."""
    return partial(Compiled, f"void({', '.join(arguments)})")
