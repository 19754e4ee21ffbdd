"""The result of scripts/frontier: held-out loss by score and share, agreement of the scores, and the page."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from laguna_serve.serving.kit.environment import Environment, cite_environment

RESAMPLES = 2000


class FrontierPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One mask: what it costs. Differences are from the unpruned model, in nats, paired by row.

    Attributes:
        mask: the score, with "-atoms" where single atoms were pruned; "random-SEED" for the controls.
        bytes_bf16: of the whole model, as `laguna compact` would store it in bf16.
        delta, low, high: added loss, and its 95% interval (rows resampled).
    """

    mask: str
    ratio: float
    bytes_bf16: int
    delta: float
    low: float
    high: float


class FrontierResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.pruning_frontier/1"
):
    """Losses in nats per token of held-out text; `correlations`: Spearman's, over all atoms, score by score."""

    environment: Environment
    model: str
    calibration_tokens: int
    text: str
    rows: int
    targets: int
    unpruned: float
    bytes_bf16: int
    points: tuple[FrontierPoint, ...]
    correlations: dict[str, dict[str, float]]


def compare_rows(
    nats: npt.NDArray[np.float64], base: npt.NDArray[np.float64], targets: npt.NDArray[np.int64]
) -> tuple[float, float, float]:
    """Compute the added loss per token and its 95% interval.

    nats, base [R]: summed losses of the same rows; targets [R]: how many tokens were predicted.
    """
    added = nats - base
    drawn = np.random.default_rng(0).integers(0, len(added), (RESAMPLES, len(added)))
    means = added[drawn].sum(1) / targets[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(added.sum() / targets.sum()), float(low), float(high)


def rank(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Ranks of values, equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return ranks


def correlate(scores: dict[str, npt.NDArray[np.float32]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of every two scores."""
    ranks = {name: rank(values) for name, values in scores.items()}
    return {
        one: {other: round(float(np.corrcoef(ranks[one], ranks[other])[0, 1]), 4) for other in ranks} for one in ranks
    }


def format_page(result: FrontierResult) -> str:
    """Format a Markdown page: a row per mask and a column per share, then the correlations."""
    ratios = sorted({point.ratio for point in result.points})
    sizes = {point.ratio: point.bytes_bf16 for point in result.points}
    lines = [
        "# Held-out loss against bytes, by score",
        "",
        f"Unpruned: {result.unpruned:.4f} nats, {result.bytes_bf16:,} bytes in bf16. Added nats, 95% intervals:",
        "",
        "| mask | " + " | ".join(f"{ratio:.0%} ({sizes[ratio]:,} bytes)" for ratio in ratios) + " |",
        "|--" * (1 + len(ratios)) + "|",
    ]
    for mask in dict.fromkeys(point.mask for point in result.points):
        cells = [
            f"{point.delta:+.4f} ({point.low:+.4f} to {point.high:+.4f})"
            for ratio in ratios
            for point in result.points
            if (point.mask, point.ratio) == (mask, ratio)
        ]
        lines.append(f"| {mask} | " + " | ".join(cells) + " |")
    names = list(result.correlations)
    lines += ["", "Spearman's correlation of the scores of all atoms:", "", "| | " + " | ".join(names) + " |"]
    lines.append("|--" * (1 + len(names)) + "|")
    lines += [f"| {one} | " + " | ".join(f"{result.correlations[one][o]:.3f}" for o in names) + " |" for one in names]
    lines += [
        "",
        f"{result.targets:,} tokens of {result.text} in {result.rows} evenly spaced rows, fp32, masks applied in"
        f" memory; scores of {result.calibration_tokens:,} tokens. Every expert keeps a group (of `-atoms`: an atom),"
        " also by `reap`, which ranks whole experts: the router is left alone. Random masks prune groups of `loss`.",
        "",
        cite_environment(result.environment),
    ]
    return "\n".join(lines) + "\n"
