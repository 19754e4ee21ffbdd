"""The result of bench/fuzz.py: `fuzz.json`, schema laguna_serve.fuzz/1."""

from __future__ import annotations

from msgspec import Struct

from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment


class SentRequest(Struct, frozen=True, kw_only=True):
    """A request as reports show it: bodies may hold what JSON does not have, and are quoted as Python."""

    route: str
    body: str
    leave_after: int | None


class Finding(Struct, kw_only=True):
    """A kind of wrong answer.

    Attributes:
        kind: what is wrong, without its numbers.
        wrong: everything that was wrong with the first such batch.
        died: it took the engine down.
        seen: in so many batches.
        requests: the smallest batch that still shows it.
    """

    kind: str
    wrong: list[str]
    died: bool
    seen: int
    requests: list[SentRequest]


class FuzzedEngine(Struct, frozen=True, kw_only=True):
    """The engine, and the seed of the drawn batches."""

    model: str
    draft: str | None
    seed: int


class FuzzResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.fuzz/1"):
    """A run, with the runs that it resumed.

    Attributes:
        starts: of the engine.
        deaths: kinds of findings that took it down.
        statuses: "route status" → how often.
    """

    environment: Environment
    engine: FuzzedEngine
    batches: int
    requests: int
    starts: int
    minutes: float
    deaths: int
    findings: list[Finding]
    statuses: dict[str, int]


# The line for programs.
LINE = Brief(without=("statuses",))
