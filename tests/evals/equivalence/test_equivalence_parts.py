"""Parts of an equivalence check alone: acceptance of an arm, and which levels weigh."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from laguna_serve.evals.equivalence.comparison import REWARD, TEXT, TOKENS, UNEXPLAINED
from laguna_serve.evals.equivalence.draft_counts import DraftCounts
from laguna_serve.evals.equivalence.verdict import INVARIANT, _weigh


def test_acceptance_is_over_every_stretch_of_an_arm(tmp_path: Path) -> None:
    path = tmp_path / "drafts.jsonl"
    path.write_text(
        '{"arm": "candidate", "drafts": 10, "accepted": 25}\n'
        '{"arm": "baseline", "drafts": 0, "accepted": 0}\n'
        '{"arm": "candidate", "drafts": 30, "accepted": 55}\n'
    )
    counts = DraftCounts(path)
    assert counts.acceptance("candidate") == 3
    assert (counts.drafts("candidate"), counts.drafts("baseline"), counts.drafts("other")) == (40, 0, None)
    assert counts.acceptance("baseline") is None


def test_other_text_of_the_same_tokens_is_not_invariant() -> None:
    levels: Any = {name: SimpleNamespace(across=int(name == TEXT)) for name in (TOKENS, TEXT, UNEXPLAINED, REWARD)}
    assert _weigh(levels, None) != INVARIANT
