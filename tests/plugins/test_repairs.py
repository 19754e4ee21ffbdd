"""What stock vLLM's sampling does on a CPU to requests that it should serve, and what comes out of ours."""

from __future__ import annotations

from typing import Any

import pytest
from probes import run_probe

pytestmark = pytest.mark.vllm


def probe(kind: str) -> dict[str, Any]:
    report: dict[str, Any] = run_probe("repair_probe.py", kind)
    return report


def test_stock_sampling_beside_drafts() -> None:
    """Where a line fails, vLLM has repaired it: take it out of plugins/repairs/drafted_sampling.py."""
    stock = probe("stock")
    assert "max()" in stock["top_k_in_a_prefill"]
    assert all("not yet supported with speculative decoding" in message for message in stock["refused"])
    assert stock["processed"][0] != [9, 9, 9]
    assert stock["min_tokens_behind_drafts"][0][2] != 7
    assert "Error" in stock["named_beside_drafts"]
    alone, beside_drafts = stock["seeded"]
    assert alone not in beside_drafts


def test_stock_logprob_token_ids_replace_the_neighbours() -> None:
    """When this fails, vLLM gives each request its own columns: retire plugins/repairs/token_logprobs.py."""
    assert probe("stock")["named_and_likeliest"][1] == [0, 0]


def test_stock_runner_turns_a_generator_back() -> None:
    """When this fails, vLLM's V1 runner spares a CPU's generators: retire plugins/repairs/seeds.py."""
    assert "CPU Generator does not use offset" in probe("stock")["cut_prompt"]


def test_stock_loader_wants_more_than_a_function() -> None:
    """When this fails, vLLM loads what a CPU's engine stored: retire plugins/repairs/compilation.py."""
    assert probe("stock")["stored_function"] is None
    assert probe("stock")["named_by_instruction_set"] is False


def test_stock_handle_is_not_released_while_tracing() -> None:
    """When this fails, vLLM gives prepared matrices back at any time: retire that half of repairs/compilation.py."""
    assert probe("stock")["released_while_tracing"] != [7]


def test_stock_drops_the_trailing_block() -> None:
    """When this fails, vLLM keeps a DFlash drafter's last block itself: retire plugins/repairs/trailing_block.py."""
    assert probe("stock")["dropped_blocks"] == {"dflash": True, "eagle3": True}


def test_stock_cannot_gather_unlike_many_rows() -> None:
    """When this fails, vLLM's CPU ranks share a mixture's rows themselves: retire plugins/repairs/collectives.py."""
    assert probe("stock")["gathered"] is None
    assert probe("repaired")["gathered"] == [[3, 2], [3], [3, 2]]


def test_stock_weights_ask_python() -> None:
    """When this fails, vLLM's parameters are torch's in this: retire plugins/repairs/parameters.py."""
    assert probe("stock")["asked_of_python"] == [True, False]


def test_weights_do_not_ask_python() -> None:
    assert probe("repaired")["asked_of_python"] == [False, False]


def test_trailing_block_is_kept_beside_dflash_alone() -> None:
    assert probe("repaired")["dropped_blocks"] == {"dflash": False, "eagle3": True}


def test_handle_is_released_while_tracing() -> None:
    assert probe("repaired")["released_while_tracing"] == [7]


def test_stored_function_is_loaded_and_named_by_its_instruction_set() -> None:
    assert probe("repaired")["stored_function"] == [2.0, 2.0]
    assert probe("repaired")["named_by_instruction_set"] is True


def test_top_k_in_a_step_without_drafts() -> None:
    assert probe("repaired")["top_k_in_a_prefill"] == [[3]]


def test_bias_and_min_p_are_taken_and_bias_is_on_every_row() -> None:
    assert probe("repaired")["refused"] == [None, None]
    assert probe("repaired")["processed"] == [[9, 9, 9], [3, 4, 5]]


def test_greedy_drafts_verified_at_once_give_the_same_tokens() -> None:
    verified = probe("repaired")["likeliest"]
    assert verified["differing"] == 0
    assert verified["tokens"] > 40 * 3, "some drafts are accepted"


def test_min_tokens_counts_accepted_drafts() -> None:
    assert probe("repaired")["min_tokens_behind_drafts"] == [[3, 4, 7], [6, -1, -1]]


def test_named_tokens_have_their_logprobs_beside_drafts_and_neighbours_theirs() -> None:
    ids, right = probe("repaired")["named_beside_drafts"]
    assert ids[:2] == [[3, 1, 2], [9, 1, 2]]
    assert [row[:2] for row in ids[3:5]] == [[5, 5], [6, 6]]
    assert right
    assert probe("repaired")["named_and_likeliest"][0][:2] == [1, 2]
    assert probe("repaired")["named_and_likeliest"][1][:2] == [5, 4]


def test_a_cut_prompt_leaves_the_generator_as_it_was() -> None:
    assert probe("repaired")["cut_prompt"] is True


def test_a_seed_gives_the_tokens_that_it_gives_without_drafts() -> None:
    alone, beside_drafts = probe("repaired")["seeded"]
    assert len(set(alone)) > 2
    assert beside_drafts == [alone] * 3
