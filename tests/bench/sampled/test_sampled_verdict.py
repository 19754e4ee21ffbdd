"""What a sampling test concludes from completions that are written out, and which levels it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from laguna_serve.bench.arms.arms import BASELINE
from laguna_serve.bench.sampled import verdict
from laguna_serve.bench.sampled.completions import AGAIN, name_gamma
from laguna_serve.bench.sampled.verdict import check_level, count_permutations, judge
from laguna_serve.bench.stats.two_sample import Completion
from laguna_serve.serving.kit.flags import FlagError

MIXED: list[list[Completion]] = [[(1,), (2,)] * 15] * 2
OTHER: list[list[Completion]] = [[(1,)] * 30] * 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few permutations and trials, and two shares: none, and all."""
    for name, value in {"PERMUTATIONS": 50, "TRIALS": 3, "TRIAL_PERMUTATIONS": 50, "SHARES": (0.0, 1.0)}.items():
        monkeypatch.setattr(verdict, name, value)


@pytest.mark.usefixtures("few")
def test_gammas_share_the_level_and_the_control_has_its_own() -> None:
    sets = {BASELINE: MIXED, AGAIN: MIXED, name_gamma(1): MIXED, name_gamma(3): OTHER}
    found = judge(sets, [1, 3], 0.1, seed=0)
    assert [(one.arm, one.level, one.differs) for one in found.comparisons] == [
        (AGAIN, 0.1, False),
        (name_gamma(1), 0.05, False),
        (name_gamma(3), 0.05, True),
    ]
    sound, wrong = found.comparisons[1:]
    assert (sound.p, sound.pooled_p, sound.p_values) == (1.0, 1.0, [1.0, 1.0])
    # 4 permutations for each prompt at the level of one γ, and the deal that was seen.
    assert wrong.p_values == [1 / 161] * 2
    assert (wrong.pooled_p, wrong.least_adjusted_p, wrong.p) == (1 / 161, 2 / 161, 2 / 161)


@pytest.mark.usefixtures("few")
def test_least_share_that_is_found_reliably_is_named() -> None:
    sets = {BASELINE: MIXED, AGAIN: MIXED, name_gamma(1): MIXED}
    found = judge(sets, [1], 0.05, seed=0)
    assert (found.power, found.detectable_share) == ({0.0: 0.0, 1.0: 1.0}, 1.0)
    alike = dict.fromkeys(sets, OTHER)  # all completions are the likeliest one already
    assert judge(alike, [1], 0.05, seed=0).detectable_share is None


def test_permutations_suffice_for_the_corrected_level() -> None:
    assert count_permutations(24, 0.01) == 20_000
    assert count_permutations(100, 0.001) == pytest.approx(400_000)


@pytest.mark.parametrize(("level", "gammas", "refused"), [(2e-4, 1, False), (1e-4, 1, True), (2e-4, 2, True)])
def test_level_for_which_no_machine_has_the_memory_is_refused(level: float, gammas: int, refused: bool) -> None:
    config: Any = SimpleNamespace(level=level, num_prompts=24, completions=600)
    if not refused:
        check_level(config, gammas)
        return
    least = {1: "0.00011", 2: "0.00021"}[gammas]
    expected = f"--level: expected at least {least} with 24 prompts × 600 completions, got {level:g}"
    with pytest.raises(FlagError, match=expected):
        check_level(config, gammas)
