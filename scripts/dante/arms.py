"""The arms of the ablation, what they come to, and the bars.

Texts and seeds are two samples that are crossed, as rows and draws are in scripts/frontier/estimates.py, whose interval
this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from laguna_serve.scripts.frontier.estimates import Interval, estimate
from laguna_serve.serving.kit.environment import Environment

BASE, SFT, FULL = "base", "sft", "full"
TEACHER, OTHER = "teacher", "other"
# What differs from the full objective, as fields of DanteConfig.
ARMS: dict[str, dict[str, Any]] = {
    SFT: {"plain": True, "curriculum": "none"},
    "no-cwce": {"no_weights": True},
    "no-tea": {"anchor": "none"},
    "no-curriculum": {"curriculum": "none"},
    FULL: {},
    "tea-sum": {"anchor": "sum"},
}
LEAST_GAIN = 0.25
CLOSE = 0.05


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One student's losses: text → nats, and bytes, of each passage."""

    nats: dict[str, tuple[float, ...]]
    bytes: dict[str, tuple[int, ...]]


class AblationArm(msgspec.Struct, frozen=True, kw_only=True):
    """An arm's trainings: drift of the embedding seed by seed, least, mean and most weight, minutes of all."""

    name: str
    drift: tuple[float, ...]
    weights: tuple[float, float, float]
    minutes: float


class Gain(Interval, frozen=True, kw_only=True):
    """How much more nats per byte an arm has than another on a text."""

    arm: str
    over: str
    text: str


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was to hold: in words, what was measured, and whether it does."""

    what: str
    measured: float
    met: bool


class AblationResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dante_ablation/1"
):
    """Every arm beside the initialisation and beside plain fine-tuning.

    Attributes:
        level: arm → text → nats per byte, the mean over the seeds.
        gains: over the base and over sft, on either text; 95% intervals over texts and seeds.
        readings: arm → seed → losses.
    """

    environment: Environment
    model: str
    steps: int
    batch: int
    seeds: int
    arms: tuple[AblationArm, ...]
    level: dict[str, dict[str, float]]
    gains: tuple[Gain, ...]
    bars: tuple[Bar, ...]
    readings: dict[str, dict[str, Reading]]

    def find(self, arm: str, over: str, text: str) -> Gain | None:
        """Find a difference; None of what was not trained."""
        return next((gain for gain in self.gains if (gain.arm, gain.over, gain.text) == (arm, over, text)), None)


def compare_arms(
    environment: Environment,
    model: str,
    steps: int,
    batch: int,
    arms: tuple[AblationArm, ...],
    readings: Mapping[str, Mapping[int, Reading]],
) -> AblationResult:
    """Compare every arm with the base and with plain fine-tuning, seed by seed and text by text."""
    gains, level = [], {}
    for name in readings:
        level[name] = {text: round(_level(readings[name], text), 5) for text in (TEACHER, OTHER)}
        for over in (BASE, SFT):
            if over in readings and name not in (over, BASE):
                gains += [_compare(readings, name, over, text) for text in (TEACHER, OTHER)]
    result = AblationResult(
        environment=environment,
        model=model,
        steps=steps,
        batch=batch,
        seeds=max(map(len, readings.values())),
        arms=arms,
        level=level,
        gains=tuple(gains),
        bars=(),
        readings={name: {str(seed): one for seed, one in runs.items()} for name, runs in readings.items()},
    )
    return msgspec.structs.replace(result, bars=_list_bars(result))


def _list_bars(result: AblationResult) -> tuple[Bar, ...]:
    bars = []
    if (gain := result.find(FULL, BASE, TEACHER)) is not None:
        met = gain.delta <= -LEAST_GAIN
        bars.append(Bar(what=f"full at least {LEAST_GAIN} nats per byte below base", measured=gain.delta, met=met))
    if (gap := result.find(FULL, SFT, TEACHER)) is not None:
        met = gap.delta <= CLOSE
        bars.append(Bar(what=f"full within {CLOSE} of plain fine-tuning", measured=gap.delta, met=met))
    if (kept := result.find(FULL, SFT, OTHER)) is not None:
        what = "full forgets less than plain fine-tuning (whole interval below 0)"
        bars.append(Bar(what=what, measured=kept.delta, met=kept.high < 0))
    return tuple(bars)


def _level(runs: Mapping[int, Reading], text: str) -> float:
    return float(np.mean([sum(one.nats[text]) / sum(one.bytes[text]) for one in runs.values()]))


def _compare(readings: Mapping[str, Mapping[int, Reading]], arm: str, over: str, text: str) -> Gain:
    seeds = sorted(readings[arm])
    # The base is the same for every seed.
    others = [readings[over].get(seed) or readings[over][0] for seed in seeds]
    added = np.array([readings[arm][seed].nats[text] for seed in seeds]) - [other.nats[text] for other in others]
    found = estimate(added, np.array(others[0].bytes[text]))
    return Gain(arm=arm, over=over, text=text, delta=found.delta, low=found.low, high=found.high)
