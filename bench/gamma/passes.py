"""One pass of a γ sweep's engine, as it is kept where engines are measured one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from laguna_serve.bench.arms.arms import BASELINE, Arm
from laguna_serve.bench.harness.in_turn import Passes, run_pass
from laguna_serve.bench.harness.run import ArmRun, MeasurementStoppedError, counter_delta
from laguna_serve.bench.harness.schedule import Plan
from laguna_serve.bench.stats.intervals import chunk_gaps_ms
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.kit.progress import Progress


class Asked(Struct, frozen=True, kw_only=True):
    """An arm's greedy answers, and the loss (nats per token) over the `tokens` of the prompts."""

    token_ids: list[list[int]]
    loss: float
    tokens: int


class SweepPass(Struct, kw_only=True):
    """Rounds of one engine; of plain ones also ms of a step by rows, and what ablations ask."""

    run: ArmRun
    rows_ms: dict[int, float] = {}
    asked: Asked | None = None


Measure = Callable[[Arm, str], SweepPass]


def open_passes(folder: Path) -> Passes[SweepPass]:
    """Open the passes of a sweep, of one of its ablations, or of its mixed load."""
    return Passes(folder, SweepPass)


def make_measure(
    passes: Passes[SweepPass],
    plans: Mapping[str, Plan],
    progress: Progress,
    rows: Mapping[str, Sequence[int]] | None = None,
    ask: Callable[[Arm], Asked] | None = None,
    *,
    drafts: bool = True,
) -> Measure:
    """How a pass over a part's plan is made; of plain engines with steps over so many `rows`, and what `ask` asks.

    `drafts`: a candidate that never drafts was not what it was meant to be.
    """

    def measure(arm: Arm, part: str) -> SweepPass:
        run = run_pass(arm, part, plans, passes, lambda kept: kept.run, progress)
        if arm.name != BASELINE:
            if drafts and (delta := counter_delta(run)) is not None and not delta.drafts:
                raise MeasurementStoppedError("a drafter was configured but never drafted")
            return SweepPass(run=run)
        timed = {count: asyncio.run(measure_rows(arm, plans[part], count)) for count in (rows or {}).get(part, ())}
        rows_ms = {count: ms for count, ms in timed.items() if ms is not None}
        return SweepPass(run=run, rows_ms=rows_ms, asked=None if ask is None else ask(arm))

    return measure


async def measure_rows(arm: Arm, plan: Plan, rows: int) -> float | None:
    """Mean ms of a plain step over so many rows, as many sequences decoding together.

    That is what verifying them takes, and what a speculative step takes beyond it is the drafter's. None with fewer
    prompts than rows, and where a request failed of an engine that lives.

    Raises:
        EngineError: the engine died.
    """
    prompts = plan.prompts
    if rows > len(prompts):
        return None
    async with open_session() as session:
        client = await arm.connect(session, plan.max_tokens)
        records = await client.run_round(prompts[:rows])
    if any(record.error is not None for record in records):
        await arm.look_for_death()
        return None
    # From when the last prompt has been read to when the first answer ends, all rows are in every step.
    begin = max(record.chunk_ns[0] for record in records)
    end = min(record.chunk_ns[-1] for record in records)
    gaps = [
        gap
        for record in records
        for gap, ns in zip(chunk_gaps_ms(record.chunk_ns), record.chunk_ns[1:], strict=True)
        if begin < ns <= end
    ]
    return float(sum(gaps) / len(gaps)) if gaps else None
