"""Steps in numbers of rows that come again: which, and the tokens of a real engine with them and without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probes import run_probe

from laguna_serve.plugins.repairs.row_counts import EXACT, pad

TOY = Path(__file__).resolve().parent.parent / "toy"
MOST = 500  # rows of a step in the probe


def test_numbers_of_rows_are_few_and_hardly_larger() -> None:
    padded = [pad(rows) for rows in range(1, 2049)]
    assert padded[:EXACT] == list(range(1, EXACT + 1))
    assert all(rows <= more <= rows * 1.25 for rows, more in enumerate(padded, 1))
    assert sum(padded) < 1.02 * sum(range(1, 2049))
    assert len(set(padded[EXACT:])) < 80
    assert padded == sorted(padded)
    assert all(pad(rows) == rows for rows in padded)


@dataclass(frozen=True)
class Batch:
    num_tokens: int
    num_reqs: int | None = None


@pytest.mark.parametrize(
    ("rows", "most", "expected", "changes"),
    [
        (10, 2048, 10, {}),
        (100, 2048, 112, {}),
        (300, 2048, 320, {}),
        (490, 500, 500, {}),
        (100, 2048, 100, {"data_parallel_size": 2}),
        (100, 2048, 100, {"is_pooling_model": True}),
        (100, 2048, 100, {"lora_config": True}),
    ],
    ids=["decoding", "a prompt", "more", "no room", "several ranks agree on theirs", "pooling", "adapters"],
)
def test_a_step_is_padded_within_the_buffers(rows: int, most: int, expected: int, changes: dict[str, int]) -> None:
    from laguna_serve.plugins.repairs.padded_rows import wrap_padding

    parallel: Any = SimpleNamespace(data_parallel_size=changes.get("data_parallel_size", 1))
    config = SimpleNamespace(parallel_config=parallel, lora_config=changes.get("lora_config"))
    pooling = "is_pooling_model" in changes
    runner = SimpleNamespace(max_num_tokens=most, vllm_config=config, is_pooling_model=pooling)
    determine = wrap_padding(lambda _self, num_tokens, **_others: ("mode", Batch(num_tokens, 3), False, None))
    assert determine(runner, rows, num_reqs=3) == ("mode", Batch(expected, 3), False, None)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    found: dict[str, Any] = run_probe("padded_rows_probe.py", str(TOY))
    return found


@pytest.mark.vllm
def test_tokens_are_those_of_unpadded_steps(seen: dict[str, Any]) -> None:
    assert seen["padded"]["tokens"] == seen["stock"]["tokens"]
    assert all(rows in {pad(rows), MOST} for rows in seen["padded"]["rows"])


@pytest.mark.vllm
def test_stock_pads_no_step(seen: dict[str, Any]) -> None:
    """The repair can go when it does."""
    assert any(rows not in {pad(rows), MOST} for rows in seen["stock"]["rows"])
