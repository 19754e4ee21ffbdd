"""bench/ab.py finds every divergence and gives it its class."""

from __future__ import annotations

import pytest
from ab_harness import TIMED, RunAb
from mock_engine import Settings


@pytest.mark.parametrize(
    ("baseline", "candidate", "expected", "status"),
    [
        (Settings(margin=0.0), Settings(flips={TIMED[2]: 5}, margin=0.0), "tie", 0),
        (Settings(margin=0.03), Settings(flips={TIMED[2]: 5}, margin=0.02, noise=0.02), "near_tie", 0),
        (Settings(margin=0.03), Settings(flips={TIMED[2]: 5}, margin=0.05, noise=0.02), "defect", 1),
        (Settings(margin=0.03), Settings(flips={TIMED[2]: 5}, noise=0.7), "defect", 1),
        (Settings(), Settings(flips={TIMED[2]: 5}, hide_second=True), "defect", 1),
    ],
    ids=["tie", "near-tie", "margin-beyond-noise", "noise-beyond-rounding", "token-not-in-top-2"],
)
def test_a_divergence_gets_its_class(
    run_ab: RunAb, baseline: Settings, candidate: Settings, expected: str, status: int
) -> None:
    got, result, output = run_ab(baseline, candidate, "--dtype", "float32")
    assert got == status
    assert result["parity"]["mismatches"] == 1
    (found,) = result["parity"]["divergences"]
    assert (found["prompt_id"], found["index"], found["classification"]) == ("p2", 5, expected)
    assert found["baseline_token"] + 1 == found["candidate_token"]
    assert found["baseline_reproduced"] is found["candidate_reproduced"] is True
    assert "prompt p2, after 5 equal tokens" in output


def test_a_re_request_that_parts_earlier_is_a_defect(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(), Settings(flips={TIMED[2]: 5}, flips_again={TIMED[2]: 3}))
    assert status == 1
    (found,) = result["parity"]["divergences"]
    assert "candidate's re-request parted" in found["reason"]
    assert found["candidate_reproduced"] is False


def test_equal_ids_with_other_bytes_are_a_defect(run_ab: RunAb) -> None:
    status, result, _ = run_ab(Settings(), Settings(other_text=True))
    assert status == 1
    assert result["parity"]["classes"]["defect"] == 10
    assert result["parity"]["divergences"][0]["index"] is None
