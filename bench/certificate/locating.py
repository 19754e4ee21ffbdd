"""The first operation that gives a row other values beside other rows, asked where the passes differ most.

`serving/engine/row_check.py` asks the engine's own modules; here is chosen what it is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.bench.certificate.result import LoadResult
from laguna_serve.bench.certificate.verdict import Answers
from laguna_serve.bench.stats.parity import list_differences
from laguna_serve.serving.engine.row_check import RowCheck

# Where there is no drafter whose γ says how many rows are verified at once.
DEFAULT_ROWS = 8
MAX_COPIES = 16


def differs(loads: Sequence[LoadResult]) -> bool:
    """Whether a token or a bit of a log-probability of the candidate is not the baseline's."""
    return any(
        load.candidate.mismatches > 0 or (load.candidate.difference is not None and load.candidate.difference.max > 0)
        for load in loads
    )


def choose_sequence(baseline: Answers, candidate: Answers, rows: int) -> tuple[int, ...]:
    """Prompt and answer of the baseline's where the arms differ first, as far as a verification there looks ahead.

    Tokens that differ go before log-probabilities that do; without either it is the first prompt with its answer.
    """

    def rank(prompt_id: str) -> tuple[int, float]:
        ours, theirs = baseline[prompt_id], candidate[prompt_id]
        index = _find_parting(ours.token_ids, theirs.token_ids)
        return len(ours.token_ids) if index is None else index, -max(list_differences(ours, theirs), default=0.0)

    prompt_id = min(baseline, key=rank)
    probe = baseline[prompt_id]
    index = _find_parting(probe.token_ids, candidate[prompt_id].token_ids)
    end = len(probe.token_ids) if index is None else index + rows
    return (*probe.prompt_ids, *probe.token_ids[:end])


def describe_rows(check: RowCheck) -> list[str]:
    """Describe each way in which the rows were computed, a sentence each."""
    lines = []
    for way in check.ways:
        what = f"Operations, {way.label} against one row at a time ({check.tokens} tokens): "
        if way.first is None:
            lines.append(f"{what}none differs, over {way.compared:,} values of rows compared to the bit.")
        else:
            lines.append(f"{what}the first that differs: {way.first.describe()}.")
    return lines


def _find_parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
