"""What a client may send without harm: limits, and whose mistake an error says it is."""

from __future__ import annotations

from typing import Any

import pytest
from probes import run_probe

pytestmark = pytest.mark.vllm


def probe(kind: str) -> dict[str, Any]:
    report: dict[str, Any] = run_probe("limits_probe.py", kind)
    return report


def test_stock_takes_any_number_in_a_schema() -> None:
    """When this fails, vLLM has limits of its own: retire plugins/repairs/front_end/grammar_limits.py."""
    stock = probe("stock")
    assert set(stock["guidance"].values()) == {"taken"}
    assert stock["outlines"] == "taken"
    assert stock["properties"] == ["taken", "taken"]


def test_stock_blames_itself_for_a_surrogate() -> None:
    """When this fails, vLLM refuses what it cannot send: retire plugins/repairs/front_end/unsendable.py."""
    assert probe("stock")["surrogate"] == ["UnicodeEncodeError", []]


def test_stock_blames_itself_for_what_it_cannot_read() -> None:
    """When this fails, vLLM knows whose mistake it is: retire plugins/repairs/front_end/client_errors.py."""
    assert probe("stock")["unreadable"] == [500, 500]
    assert probe("stock")["dead_end"] == "GenerationError"


def test_stock_answers_messages_in_openais_form() -> None:
    """When this fails, vLLM minds the route: retire plugins/repairs/front_end/anthropic_errors.py."""
    assert [kind for _, kind, _ in probe("stock")["messages"][:2]] == [None, None]


def test_stock_lets_the_router_answer() -> None:
    """When this fails, vLLM answers in one form: retire plugins/repairs/front_end/router_errors.py."""
    assert probe("stock")["routes"] == [[404, None], [405, None], [405, None]]


def test_what_the_router_refuses_has_the_form_of_an_error() -> None:
    found = [[404, "Not Found"], [405, "Method Not Allowed"], [405, "Method Not Allowed"]]
    assert probe("repaired")["routes"] == found


def test_stock_goes_on_while_it_stops() -> None:
    """When this fails, vLLM says that it stops: retire plugins/repairs/front_end/leaving.py."""
    assert probe("stock")["leaving"] == ["taken", "taken", 500]


def test_an_engine_that_stops_says_so() -> None:
    assert probe("repaired")["leaving"] == ["EngineDeadError", "GracefulHTTPError", 503]


def test_numbers_that_a_grammar_counts_out_are_bounded() -> None:
    answers = probe("repaired")["guidance"]
    assert answers.pop("small") == "taken"
    assert len(answers) == 6
    for answer in answers.values():
        assert answer.startswith("VLLMValidationError: structured outputs: ")
        assert "at most 100000" in answer
    assert "at most 1000 " in probe("repaired")["outlines"]


def test_properties_of_an_object_are_bounded() -> None:
    first, second = probe("repaired")["properties"]
    assert first == "taken"
    assert "at most 1000 properties, got 1001" in second


def test_sequences_of_a_prompt_are_bounded() -> None:
    assert probe("stock")["sequences"] == "taken"
    assert "n must be at most 128" in probe("repaired")["sequences"]


def test_a_surrogate_is_the_clients_mistake_and_its_request_forgotten() -> None:
    assert probe("repaired")["surrogate"] == ["VLLMValidationError", [["r"]]]


def test_errors_have_the_form_of_their_api() -> None:
    answers = probe("repaired")["messages"]
    anthropic, openai = [*answers[:2], answers[4]], answers[2:4]
    assert anthropic == [[400, "error", "invalid_request_error"]] * 3
    assert [kind for _, kind, _ in openai] == [None, None]


def test_what_cannot_be_read_is_the_clients_mistake_and_nothing_else_is() -> None:
    assert probe("repaired")["unreadable"] == [400, 500]
    assert probe("repaired")["dead_end"] == "VLLMValidationError"
