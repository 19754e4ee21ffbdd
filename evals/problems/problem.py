"""One code problem, whatever file it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laguna_serve.serving.kit.errors import CommandError

# What an answer is: a function (as text, or going on from the prompt), or the value that one assertion lacks.
Kind = Literal["function", "value"]
# How it is asked: as a user's message, or as a raw prompt that is gone on with.
Form = Literal["chat", "completion"]


class ProblemsError(CommandError, ValueError):
    """A problems file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `prompt` + `canonical_solution` is a whole program; `test` defines `check(candidate)`.

    Attributes:
        open_ended: there are many right answers, of other lengths than the canonical solution's.
        base_test: of evalplus's problems, the tests that there were before evalplus added to them; `test` has all.
        asked: what a raw completion goes on from, where it is not the prompt as it is.
        message: what a chat is asked, where it is not the project's own words around the prompt.
        stops: where a raw completion ends; empty: extract.STOPS.
        kind: what an answer is.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str | None
    open_ended: bool = False
    base_test: str = ""
    asked: str = ""
    message: str = ""
    stops: tuple[str, ...] = ()
    kind: Kind = "function"
