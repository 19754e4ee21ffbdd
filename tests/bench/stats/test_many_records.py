"""Results of very many requests: what is done for each of them does not grow with their number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from laguna_serve.bench.arms.arms import ARMS
from laguna_serve.bench.harness.assemble import assemble
from laguna_serve.bench.harness.run import ArmRun, Run
from laguna_serve.bench.harness.schedule import make_plan
from laguna_serve.bench.stats import intervals
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.kit.environment import read_environment

MIB = 1 << 20


def make_record(prompt_id: str, last: int) -> Record:
    return Record(prompt_id, 0, 9, chunk_ns=[3, 5, 8], chunk_tokens=[1, 2, 1], token_ids=[1, 2, 3, last], text="")


def test_records_of_an_arm_are_not_gathered_for_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    gather = ArmRun.records.fget
    assert gather is not None

    def note(arm: ArmRun) -> dict[str, Record]:
        gathered.append(arm.label)
        return gather(arm)

    monkeypatch.setattr(ArmRun, "records", property(note))
    environment, counts = read_environment([]), []
    for number in (10, 100):
        prompts = [Prompt(id=str(i), text=str(i)) for i in range(number)]
        plan = make_plan(prompts, [], max_tokens=4, concurrency=1, control=0, seed=0)
        run = Run({name: ArmRun(name) for name in ARMS})
        for last, name in enumerate(ARMS):  # every answer differs
            run.arms[name].rounds = {i: [make_record(str(i), last)] for i in range(number)}
        gathered.clear()
        result = assemble(run, plan, environment, dtype="bfloat16", drafting=False, prompts_file="p")
        assert (result.parity.prompts, len(result.parity.divergences)) == (number, number)
        counts.append(len(gathered))
    assert counts[0] == counts[1]


def test_parts_are_summarised_as_their_values_together() -> None:
    parts = [np.array([3.0, 1.0]), np.array([]), np.array([2.0])]
    assert intervals.summarise_parts(parts) == intervals.summarise([3.0, 1.0, 2.0])
    assert intervals.summarise_parts([]) is None
    assert intervals.summarise_parts([np.array([])]) is None


def test_memory_of_a_bootstrap_is_bounded_and_its_draws_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).random((5_000, 4)) + 0.5
    usual = intervals.bootstrap_table(table, 1, resamples=500)
    monkeypatch.setattr(intervals, "BATCH_ROWS", 1 << 17)
    tracemalloc.start()
    try:
        assert intervals.bootstrap_table(table, 1, resamples=500) == usual
        assert tracemalloc.get_traced_memory()[1] < 30 * MIB
    finally:
        tracemalloc.stop()
