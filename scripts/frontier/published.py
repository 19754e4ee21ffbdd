"""The loss curve that was published of Laguna XS.2 under HEAPr's masks, for comparison as relative perplexity.

Source: Laguna Martini (https://huggingface.co/poolside-laguna-hackathon/laguna-martini), its tables of the sweep with
the parent's routing, of the random controls and of repacked routing; 1,024 × 4,096 held-out tokens, bf16, one
calibration, no intervals.
"""

from __future__ import annotations

import msgspec


class PublishedCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Share of groups pruned → perplexity over that of the unpruned model."""

    name: str
    shares: tuple[float, ...]
    perplexities: tuple[float, ...]


UNPRUNED = 10.455647
# XS.2's parameters, and those of its routed experts.
PARAMETERS, ROUTED = 33_442_617_088, 31_406_948_352
CURVES = tuple(
    PublishedCurve(name=name, shares=shares, perplexities=tuple(value / UNPRUNED for value in values))
    for name, shares, values in (
        ("XS.2, HEAPr groups", (0.1, 0.2, 0.25, 0.4), (10.629271, 11.205921, 11.783569, 14.636528)),
        ("XS.2, random groups", (0.1, 0.25), (11.948376, 12.953011)),
        ("XS.2, repacked", (0.1, 0.2, 0.4), (11.075862, 12.395307, 18.700425)),
    )
)


def left_of_model(share: float) -> float:
    """Parameters, and in bf16 bytes, that are left of the whole XS.2 with that share of its groups pruned."""
    return 1 - share * ROUTED / PARAMETERS
