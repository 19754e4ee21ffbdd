"""Whether all engines of a model serve with the same weights, which a version's name alone does not prove.

Engines that `laguna serve --weight-updates` starts digest what they compute with, drafter and packed matrices among it
(plugins/weight_digests.py); those that were started alike, on the same kind of processor, have the same digests. Where
one engine is data parallel, vLLM lets its first part alone answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.kit.results import JsonObject

# What the admin port shows them at, by engine.
ROUTE = "/admin/weight_digests"

# What an engine is asked, and before anything is touched whether it will know.
PATH = "/collective_rpc"
BODY = {"method": "digest_weights"}
PROBE = {"method": "can_digest_weights"}
PARTS = {"model": "the model", "draft": "the drafter"}
K = TypeVar("K")


class Digests(msgspec.Struct, frozen=True):
    """Of one rank: SHA-256 in hex of its part of the model, and of its drafter."""

    model: str
    draft: str | None


class _Answer(msgspec.Struct, frozen=True):
    results: list[Digests]


def read(answers: Mapping[Engine, JsonObject]) -> tuple[dict[Engine, Sequence[Digests]], dict[Engine, str]]:
    """Read engines' answers, a rank after the other; what is wrong with those that are none, in words."""
    found, wrong = dict[Engine, Sequence[Digests]](), dict[Engine, str]()
    for engine, answer in answers.items():
        try:
            found[engine] = msgspec.convert(answer, _Answer).results
        except msgspec.ValidationError as error:
            wrong[engine] = f"expected digests, got an answer where {error}"
    return found, wrong


def find_differing(found: Mapping[K, Sequence[Digests]], name: Callable[[K], str]) -> dict[K, str]:
    """Find the engines whose weights are not those of most; what is wrong with them, in words.

    Where no weights are of most, they are held against the first of the commonest. `name` is how an engine is called.
    """
    (common, _), *_ = Counter(map(tuple, found.values())).most_common(1)
    first = next(engine for engine, ranks in found.items() if tuple(ranks) == common)
    return {
        engine: f"expected the weights of {name(first)}, got others: {faults}"
        for engine, ranks in found.items()
        if (faults := _compare(common, ranks))
    }


def _compare(one: Sequence[Digests], other: Sequence[Digests]) -> str:
    if len(one) != len(other):
        return f"{len(other)} ranks instead of {len(one)}"
    pairs = [*zip(one, other, strict=True)]
    return " and ".join(
        words for part, words in PARTS.items() if any(getattr(a, part) != getattr(b, part) for a, b in pairs)
    )
