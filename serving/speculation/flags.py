"""The flags of a drafter that several commands share."""

from __future__ import annotations

import argparse
from typing import Annotated, Literal

from laguna_serve.serving.kit.flags import Flag

ADAPTIVE: Literal["adaptive"] = "adaptive"


def parse_gamma(text: str) -> int | None:
    """Parse a number of tokens, or "max" (None)."""
    if text == "max":
        return None
    try:
        gamma = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or max, got {text!r}") from None
    if gamma < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 or max, got {gamma}; leave --draft out to serve without")
    return gamma


def parse_gamma_or_adaptive(text: str) -> int | str | None:
    """Parse a number of tokens, "max" (None), or "adaptive"."""
    return ADAPTIVE if text == ADAPTIVE else parse_gamma(text)


DraftSampling = Annotated[
    Literal["greedy", "probabilistic"],
    Flag(
        "how drafts for sampled requests are chosen: the likeliest token, or drawn from the drafter's distribution,"
        " which more of are accepted at the price of a vocabulary of fp32 per draft (default: greedy)"
    ),
]
Gamma = Annotated[
    int | None,
    Flag("tokens drafted per step, N or max (default: the drafter's most)", metavar="N|max", parse=parse_gamma),
]
GammaOrAdaptive = Annotated[
    int | Literal["adaptive"] | None,
    Flag(
        "tokens drafted per step, N or max (default: the drafter's most), or adaptive: decided in every step",
        metavar="N|max|adaptive",
        parse=parse_gamma_or_adaptive,
    ),
]
