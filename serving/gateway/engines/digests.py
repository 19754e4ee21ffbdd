"""Whether all engines of a model serve with the same weights, which a version's name alone does not prove.

Engines that `laguna serve --weight-updates` starts digest what they compute with, drafter and packed matrices among it
(plugins/weight_digests.py); those that were started alike, on the same kind of processor, have the same digests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from laguna_serve.serving.gateway.engines.engine import Engine
from laguna_serve.serving.kit.results import JsonObject

# What an engine is asked; {"results": [{"model": hex, "draft": hex or null}, … one per rank]} is its answer.
PATH = "/collective_rpc"
BODY = {"method": "digest_weights"}
PARTS = {"model": "the model", "draft": "the drafter"}


def find_differing(answers: Mapping[Engine, JsonObject]) -> dict[Engine, str]:
    """Find the engines whose weights are not those of the first; what is wrong with them, in words."""
    first, *others = answers
    return {
        engine: f"expected the weights of {first.name}, got others: {faults}"
        for engine in others
        if (faults := _compare(answers[first]["results"], answers[engine]["results"]))
    }


def _compare(one: Sequence[JsonObject], other: Sequence[JsonObject]) -> str:
    if len(one) != len(other):
        return f"{len(other)} ranks instead of {len(one)}"
    apart = {part for a, b in zip(one, other, strict=True) for part in PARTS if a[part] != b[part]}
    return " and ".join(words for part, words in PARTS.items() if part in apart)
