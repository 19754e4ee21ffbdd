"""The result of scripts/frontier: held-out loss by score, share and format, and what can be said of it."""

from __future__ import annotations

import math

import msgspec

from laguna_serve.scripts.frontier.estimates import Contest, Interval
from laguna_serve.scripts.frontier.published import PublishedCurve
from laguna_serve.serving.kit.environment import Environment


class FrontierText(msgspec.Struct, frozen=True, kw_only=True):
    """What the losses were measured on; `targets`: predicted tokens."""

    source: str
    rows: int
    targets: int


class FrontierCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """What the scores were measured on: `draws` times `rows` of the source's `available` rows, drawn at random."""

    source: str
    draws: int
    rows: int
    available: int
    tokens: tuple[int, ...]


class FrontierFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The unpruned model in one format: bytes of its compact form, and its loss in nats per token.

    Attributes:
        rounding: loss over that in the first format, whose own is 0.
    """

    format: str
    bytes: int
    loss: float
    rounding: Interval


class FrontierPoint(Interval, frozen=True, kw_only=True):
    """What a mask costs: added loss over the unpruned model of the same format, in nats per token, with 95% intervals.

    Attributes:
        mask: the score, with `-atoms` where single atoms were pruned; `reap-experts` and `mone` prune whole experts,
            `heapr-repacked` routes to the kept blocks of `heapr` one by one.
        bytes: of the whole model as `laguna compact` would store it.
        draws: the added loss of each calibration draw, or random mask.
    """

    mask: str
    format: str
    ratio: float
    bytes: int
    draws: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """That of the unpruned model is 1."""
        return math.exp(self.delta)


class Repacking(Interval, frozen=True, kw_only=True):
    """How much more the same blocks cost when they are routed to one by one than by their parents' routing."""

    ratio: float


class FrontierResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_frontier/2"
):
    """What every mask costs, which masks are best, and how far the scores agree.

    Attributes:
        points: a mask's, share by share, format by format.
        contests: which mask of groups or whole experts is best at each share in each format.
        atoms: added loss of single atoms less that of groups: mask → share in percent → interval, in the first format.
        repacking: repacked routing less the parent's, in the first format.
        correlations: Spearman's, over all atoms, score by score; the mean over the draws.
        repeatability: Spearman's, of a score with itself on another draw.
        published: XS.2's own curves.
    """

    environment: Environment
    model: str
    block_size: int
    text: FrontierText
    calibration: FrontierCalibration
    formats: tuple[FrontierFormat, ...]
    points: tuple[FrontierPoint, ...]
    contests: tuple[Contest, ...]
    atoms: dict[str, dict[str, Interval]]
    repacking: tuple[Repacking, ...]
    correlations: dict[str, dict[str, float]]
    repeatability: dict[str, float]
    published: tuple[PublishedCurve, ...]
