"""What the arms come to, from losses made by hand: levels, paired intervals, bars, table and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from laguna_serve.scripts.dante.ablate import AblateConfig, cut_passages
from laguna_serve.scripts.dante.arms import ARMS, BASE, FULL, SFT, AblationArm, AblationResult, Reading, compare_arms
from laguna_serve.scripts.dante.page import draw_ablation, format_ablation
from laguna_serve.scripts.training.dante.records import CacheError
from laguna_serve.serving.kit.environment import read_environment
from laguna_serve.serving.kit.flags import FlagError

PASSAGES = 20


def read(teacher: float, other: float, seed: int) -> Reading:
    """Losses around a level in nats per byte; passages differ, in the same way for every student."""
    sizes = np.arange(50, 50 + PASSAGES)
    own = np.random.default_rng(0).normal(1, 0.2, PASSAGES)
    noise = np.random.default_rng(seed).normal(1, 0.01, PASSAGES)
    nats = {
        name: tuple((level * own * noise * sizes).tolist()) for name, level in (("teacher", teacher), ("other", other))
    }
    return Reading(nats=nats, bytes=dict.fromkeys(nats, tuple(sizes.tolist())))


def compare(sft: tuple[float, float], full: tuple[float, float]) -> AblationResult:
    readings = {
        BASE: {0: read(1.66, 2.29, 99)},
        SFT: {seed: read(*sft, seed) for seed in range(3)},
        FULL: {seed: read(*full, 10 + seed) for seed in range(3)},
    }
    arms = tuple(
        AblationArm(name=name, drift=(0.1, 0.2, 0.3), weights=(0.5, 0.6, 0.7), minutes=1.0) for name in (SFT, FULL)
    )
    return compare_arms(read_environment("test"), "base", 50, 16, arms, readings)


def test_differences_are_paired_by_passage_and_seed() -> None:
    result = compare((1.28, 2.43), (1.31, 2.40))
    gain = result.find(FULL, BASE, "teacher")
    assert gain is not None
    assert gain.delta == pytest.approx(-0.35, abs=0.03)
    # Passages differ by 20%, students on the same one by 1%: unpaired, the half width would be a multiple.
    kept = result.find(FULL, SFT, "other")
    assert kept is not None
    assert 0 < kept.high - kept.low < 0.12
    assert result.find(BASE, SFT, "other") is None
    assert result.seeds == 3


def test_bars_are_met_and_missed() -> None:
    assert [bar.met for bar in compare((1.28, 2.60), (1.31, 2.40)).bars] == [True, True, True]
    assert [bar.met for bar in compare((1.45, 2.40), (1.52, 2.40)).bars] == [False, False, False]


def test_table_and_picture(tmp_path: Path) -> None:
    result = compare((1.28, 2.43), (1.31, 2.40))
    text = format_ablation(result)
    assert "| initialisation |" in text
    assert "| plain fine-tuning |" in text
    assert "3 seeds" in text
    draw_ablation(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_each_arm_leaves_one_part_out(tmp_path: Path) -> None:
    config = AblateConfig(model=tmp_path, cache=tmp_path, held_out=tmp_path, out=tmp_path)
    full = config.describe(FULL, 1)
    assert (full.weighs, full.anchored, full.curriculum, full.seed) == (True, "relative", "output_entropy", 1)
    differing = {
        name: {key for key, value in config.describe(name, 1).decisive.items() if value != full.decisive[key]}
        for name in ARMS
    }
    assert differing == {
        SFT: {"plain", "curriculum"},
        "no-cwce": {"no_weights"},
        "no-tea": {"anchor"},
        "no-curriculum": {"curriculum"},
        FULL: set(),
        "tea-sum": {"anchor"},
    }
    with pytest.raises(FlagError, match="--arms"):
        AblateConfig(model=tmp_path, cache=tmp_path, held_out=tmp_path, out=tmp_path, arms=("base",))


def test_passages_are_evenly_spaced() -> None:
    documents = ["".join(chr(97 + number % 26) for number in range(1000)), "short"]
    passages = cut_passages(documents, 3, 100)
    assert [passage.text[0] for passage in passages] == [documents[0][place] for place in (0, 300, 600)]
    assert len(cut_passages(documents, 64, 100)) == 9
    with pytest.raises(CacheError, match="--other"):
        cut_passages(["short"], 3, 100)
